"""FuseChat: fuse chat LLMs of different architecture, size and tokenizer into one."""

import os
import sys

__version__ = "0.1.0"


def _is_command() -> bool:
    """Whether this process is being started as a command of ours, not as a program that uses the package."""
    first = sys.argv[0] if sys.argv else ""
    if first == "-m":  # ``python -m``, whose module is not found yet
        module = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] if "-m" in sys.orig_argv else []
        return module != [] and module[0].partition(".")[0] == __name__
    folder, name = os.path.split(os.path.abspath(first))
    return name == __name__ or (name in ("train.py", "merge.py") and folder == os.path.dirname(__path__[0]))


if _is_command():  # what takes time is still to be imported
    from fusechat.app import ending

    ending.at_once()
