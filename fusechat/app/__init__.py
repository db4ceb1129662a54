"""What every command shares; knows nothing of the steps."""
