"""What flows between the steps: distributions, on disk and in memory."""
