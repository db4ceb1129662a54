"""A disk's errors become one line, whichever library met them."""

import errno

import pytest
from safetensors import SafetensorError

from fusechat.app.disk import told
from fusechat.app.errors import UserError

FULL = "what was finished is whole: make room and run the same command again"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), rf"^No space left on device \(/a/b\); {FULL}$"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), f"^Disk quota exceeded; {FULL}$"),
        (OSError(errno.EIO, "Input/output error"), "^Input/output error; .*: see to the disk and run the same"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), f"^No space left on device; {FULL}$"),
    ],
)
def test_the_message(error: Exception, message: str) -> None:
    with pytest.raises(UserError, match=message), told():
        raise error
    with pytest.raises(UserError, match=message), told():
        try:
            raise error
        except Exception as first:
            raise RuntimeError("of a library") from first


def test_other_errors_stay() -> None:
    for other in (KeyError("x"), OSError(errno.ENOENT, "No such file"), UserError("mine (os error 28)")):
        with pytest.raises(type(other)) as caught, told():
            raise other
        assert caught.value is other
