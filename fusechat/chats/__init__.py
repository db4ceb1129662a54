"""Chats in any format -> tokens, spans and masks."""
