"""What a disk does wrong, told in one line, whichever library was writing."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from fusechat.app.errors import UserError

REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room")
REMEDIES |= dict.fromkeys((errno.EIO, errno.EROFS), "see to the disk")
OF_RUST = re.compile(r"\(os error (\d+)\)")  # how safetensors and tokenizers end their messages


@contextmanager
def told() -> Iterator[None]:
    """Raises a `UserError` for what a full, broken or read-only disk does within the block."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number, file = cause(error)
        if number not in REMEDIES:
            raise
        where = f" ({file})" if file else ""
        whole = "what was finished is whole"
        raise UserError(
            f"{os.strerror(number)}{where}; {whole}: {REMEDIES[number]} and run the same command again"
        ) from error


def cause(error: BaseException | None) -> tuple[int, str]:
    """The system's error number behind an exception, and the file where it says so; 0 where there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno, str(error.filename2 or error.filename or "")
        if found := OF_RUST.search(str(error)):
            return int(found[1]), ""
        error = error.__cause__ or error.__context__
    return 0, ""
