"""What a command finds around it: models by directory or Hub id, devices, folders to write to, room on the disk."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError
from fusechat.app.quantities import size
from fusechat.app.schema.values import is_hub_id
from fusechat.app.schema.words import shown

LOG = logging.getLogger(__name__)
UNKNOWN_TO_SYSTEM = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)  # file systems that have no files without a name


def check_place(path: str, key: str = "") -> None:
    """Raises `UserError` unless a model's path is a directory or GGUF file, or reads as a Hub id."""
    place = Path(path)
    gguf = path.endswith(".gguf") and place.is_file()
    readable = (place.is_dir() or gguf) and os.access(place, os.R_OK)
    if readable or (is_hub_id(path) and not place.parent.exists()):
        return
    hint = "; make it with: python -m fusechat.tiny" if "world/models" in path else ""
    what = "does not exist" if not place.exists() else "cannot be read" if place.is_dir() or gguf else "is a file"
    named = f"{key}={path}" if key else path
    raise UserError(f"{named} {what}; expected a model's directory, a GGUF file or a Hub id (owner/name){hint}")


def check_devices(section: str, accelerator: Any, devices: Any) -> None:
    """Raises `UserError` where the machine has not the accelerator, or fewer devices than asked for."""
    if accelerator not in ("gpu", "cuda", "mps"):
        return
    import torch

    cuda = torch.cuda.device_count() if accelerator != "mps" else 0
    here = cuda or int(accelerator != "cuda" and torch.backends.mps.is_available())
    if not here:
        raise UserError(f"{section}.accelerator={accelerator}: none is here; use {section}.accelerator=cpu or auto")
    wanted = max(devices) + 1 if isinstance(devices, (list, tuple)) else devices
    if isinstance(wanted, int) and wanted > here:
        raise UserError(f"{section}.devices={shown(devices)}: {here} here; use {section}.devices=auto")


def check_card(key: str, value: Any) -> None:
    """Raises `UserError` where a value needs a CUDA device and none is here."""
    import torch

    if not torch.cuda.device_count():
        raise UserError(f"{key}={shown(value)} needs a CUDA device, and none is here; leave it out")


def check_writable(key: str, path: Path) -> None:
    """Raises `UserError` where a file or folder could not be made; nothing is left behind."""
    above = next(folder for folder in path.absolute().parents if folder.exists() or folder.is_symlink())
    reason = None if above.is_dir() else f"{above} is a file"
    if reason is None:
        try:
            _try_file(path if path.is_dir() else above)
        except OSError as error:
            reason = error.strerror or str(error)
    if reason:
        raise UserError(f"{key}={path} cannot be written ({reason}); choose another with {key}=PATH")


def _try_file(folder: Path) -> None:
    """Opens a file without a name, where the system has such; it is gone when it is closed."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(13, "Permission denied")
    if not hasattr(os, "O_TMPFILE"):  # Linux has it
        return
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))
    except OSError as error:
        if error.errno not in UNKNOWN_TO_SYSTEM:
            raise


def check_room(folder: Path, need: int, what: str, key: str = "output_dir") -> None:
    """Says how much room ``what`` will take below a folder, in bytes; raises `UserError` where there is less."""
    above = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(above).free
    told = f"{what} takes about {size(need)} of the {size(free)} that are free at {above}"
    if need > free:
        raise UserError(f"{told}; make room, or choose another place with {key}=PATH")
    LOG.info(told)
