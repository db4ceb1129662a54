"""A new experiment: models and chats are looked at, its file is written, what it will take is estimated."""
