"""Commands in processes forked from one that has imported what they need: a start takes milliseconds, not seconds.

Nothing is computed before a fork, and every command and every step of a pipeline has a process of its own, as always.
What is about the start itself (the interpreter, ranks, signals) is tested with processes that are started anew.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from fusechat.app import children
from fusechat.app.verbs import VERBS

LIBRARIES = ["datasets", "lightning.pytorch", "matplotlib.pyplot", "numba", "pandas", "torch", "transformers"]
LIBRARIES += ["lightning.pytorch.loggers", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama"]
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tests.fusion.group", *LIBRARIES, *VERBS.values()])


def start(module: str, arguments: Sequence[str], output: Path) -> ForkServerProcess:
    """``python -m module arguments`` in a session of its own, what it says in ``output``."""
    process = FORKSERVER.Process(target=_session, args=(module, arguments, output))
    process.start()
    return process


def _session(module: str, arguments: Sequence[str], output: Path) -> None:
    os.setsid()
    with output.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    children.run_child = _step  # the pipeline imports it when it runs as __main__
    _run(module, arguments)


def _step(command: Sequence[str], timeout: float | None = None) -> int:
    """As `fusechat.app.children.run_child`, with the interpreter that is there."""
    sys.stdout.flush()
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 0
    gc.disable()
    try:
        _run(command[2], command[3:])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(module: str, arguments: Sequence[str]) -> None:
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
