"""Hugging Face models: reading, writing, what their heads do, their cards."""
