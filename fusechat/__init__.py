"""FuseChat: fuse chat LLMs of different architecture, size and tokenizer into one."""

__version__ = "0.1.0"
