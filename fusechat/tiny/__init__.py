"""The tiny world: generated chats and the small LLMs trained on them, so that everything runs without a hub or a GPU."""
