"""A model behind a server: its distributions and its answers, as if it ran here."""
