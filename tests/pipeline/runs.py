"""A pipeline of the miniature world as a process of its own."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import MINI, ROOT

SHORT = [*MINI, "logger=none", "callbacks.checkpoint_every_n_steps=2", "evaluation.max_new_tokens=4"]


def start(root: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fusechat.pipeline", "experiment=tiny", *SHORT, f"paths.root={root}", *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
