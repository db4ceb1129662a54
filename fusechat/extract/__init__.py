"""Extraction: chats and a source -> its next-token distributions, stored."""
