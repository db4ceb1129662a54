"""Publishing: a finished model to the Hub."""
