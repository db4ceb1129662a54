"""What comparing checksums costs: user + system seconds of a process, with hashing and with hashing left out.

The linear merge of a pivot and three targets of 0.62 GB each, and an epoch of training on the tiny models' stores.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.measure import table
from tests.benchmarks.merging import make
from tests.conftest import Mini

REPEATS = 5
NOT_HASHED = """
import xxhash
from fusechat.app import checksums, remembered, sealed
class Nothing:
    def __init__(self, *_): pass
    def update(self, data): pass
    def hexdigest(self): return "0" * 32
xxhash.xxh3_128 = Nothing
import fusechat.models.checkpoints as checkpoints
checkpoints.xxh3_128 = Nothing
checksums._windows = lambda *_: None
for module in (checksums, sealed):
    module.compare = lambda *_: None
import fusechat.models.whole as whole
whole.compare = lambda *_: None
"""
RUN = """
import sys
{patch}
import importlib
sys.argv = {arguments}
importlib.import_module(sys.argv[0]).main()
"""


def seconds(module: str, arguments: list[str], hashed: bool) -> float:
    """User and system seconds of a command in a process of its own."""
    code = RUN.format(patch="" if hashed else NOT_HASHED, arguments=[module, *arguments])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compared(what: str, module: str, arguments: list[str]) -> list[object]:
    """The lowest of several runs each, taken in turns."""
    pairs = [[seconds(module, arguments, hashed) for hashed in (True, False)] for _ in range(REPEATS)]
    hashed, plain = (min(column) for column in zip(*pairs, strict=True))
    return [what, plain, hashed, f"{100 * (hashed / plain - 1):.1f} %"]


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        root = Path(folder)
        os.environ["FUSECHAT_CACHE"] = str(root / "memory")
        make(root / "models", 1024, 18)
        targets = ",".join(str(root / "models" / t) for t in ("t1", "t2", "t3"))
        merge = ["merge=linear", f"pivot.path={root}/models/pivot", f"targets=[{targets}]", f"output_dir={root}/out"]
        merge += ["overwrite=true", "logger=none", f"paths.root={root}"]
        rows = [compared("merge=linear", "merge", merge)]
        world = Mini(root / "runs", "tiny.fusion_chats=960")
        world.run("tiny")
        for source in ("pivot", "a"):
            world.run("extract", f"source={source}")
        world.run("align", "source=a")
        epoch = ("source=a", "overwrite=true", "trainer.max_epochs=1", "trainer.max_steps=-1", "logger=none")
        rows.append(compared("an epoch of 912 chats", "train", world.all(*epoch)))
        table("checksums, user + system seconds", ["what", "without", "with", "cost"], rows)


if __name__ == "__main__":
    main()
