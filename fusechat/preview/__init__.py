"""A look at the chats before anything is computed: what is trained on, and how a source's tokens meet the pivot's."""
