"""merge.py over a ~311M-parameter bf16 pivot and three targets, four shards each: time and memory of the whole process.

Peak MB is resident memory with the mapped pages of the inputs, as the kernel counts it (VmHWM, which begins at exec, where
ru_maxrss holds what the parent had at the fork); anonymous MB leaves those pages out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fusechat.models.shards import CheckpointWriter
from tests.benchmarks.measure import table

METHODS = [
    "merge=linear",
    "merge=task_arithmetic",
    *(f"merge=varm merge.granularity={g}" for g in ("matrix", "layer", "model")),
]
METHODS += ["merge=dare", "merge=dare_ties", "merge=sce", "merge=ties", "merge=model_stock", "merge=widen"]


def plan(width: int, layers: int, vocab: int = 32_000) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names and shapes of a Mistral-shaped model."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for i in range(layers):
        block = f"model.layers.{i}"
        shapes |= {f"{block}.self_attn.{p}_proj.weight": (width if p in "qo" else width // 4, width) for p in "qkvo"}
        shapes |= {
            f"{block}.mlp.gate_proj.weight": (width * 7 // 2, width),
            f"{block}.mlp.up_proj.weight": (width * 7 // 2, width),
        }
        shapes |= {f"{block}.mlp.down_proj.weight": (width, width * 7 // 2)}
        shapes |= {f"{block}.{n}.weight": (width,) for n in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}
    return {name: (shape, torch.bfloat16) for name, shape in shapes.items()}


def make(root: Path, width: int, layers: int) -> None:
    """Writes pivot, t1, t2, t3 in about four shards each."""
    shapes = plan(width, layers)
    size = sum(int(torch.Size(s).numel()) * 2 for s, _ in shapes.values())
    generator = torch.Generator().manual_seed(0)
    for name in ("pivot", "t1", "t2", "t3"):
        (root / name).mkdir(parents=True)
        writer = CheckpointWriter(root / name, shapes, size // 4 + (1 << 20))
        generator.manual_seed(0)
        noise = torch.Generator().manual_seed(sum(name.encode()))
        for key, (shape, _) in shapes.items():
            tensor = torch.randn(shape, generator=generator) * 0.02
            writer.write(key, tensor if name == "pivot" else tensor + torch.randn(shape, generator=noise) * 0.001)
        writer.close()
        (root / name / "config.json").write_text(json.dumps({"model_type": "mistral"}))


def run(root: Path, arguments: list[str]) -> tuple[float, float, float, float]:
    """Wall and CPU seconds of the whole process; its peaks of resident and of anonymous memory in MB."""
    targets = ",".join(str(root / t) for t in ("t1", "t2", "t3"))
    command = [
        sys.executable,
        "merge.py",
        f"pivot.path={root / 'pivot'}",
        f"targets=[{targets}]",
        f"output_dir={root / 'out'}",
    ]
    command += [*arguments, "overwrite=true", "logger=none", f"paths.root={root}"]
    start, peak, anonymous = time.perf_counter(), 0, 0
    environment = {**os.environ, "FUSECHAT_CACHE": str(root / "memory")}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    status = Path(f"/proc/{process.pid}/status")
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        try:
            found = {line.split()[0]: line.split()[1] for line in status.read_text().splitlines() if "kB" in line}
            peak, anonymous = int(found.get("VmHWM:", peak)), max(anonymous, int(found.get("RssAnon:", 0)))
        except OSError:
            break
        time.sleep(0.005)
    _, status_code, usage = os.wait4(process.pid, 0)
    assert status_code == 0
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, peak / 1024, anonymous / 1024


def limit(root: Path) -> float:
    """Seconds to read all inputs and write one output of the same size."""
    start, last = time.perf_counter(), []
    for name in ("pivot", "t1", "t2", "t3"):
        last = [file.read_bytes() for file in sorted((root / name).glob("*.safetensors"))]
    for number, data in enumerate(last):
        (root / f"copy{number}").write_bytes(data)
    return time.perf_counter() - start


def main() -> None:
    """Prints the tables."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        small, large = Path(folder) / "small", Path(folder) / "large"
        make(small, 1024, 18)
        rows: list[list[object]] = [["read all, write one (limit)", limit(small), "", "", ""]]
        for method in METHODS:
            shutil.rmtree(small / "memory", ignore_errors=True)  # what VaRM has measured
            rows.append([method, *run(small, method.split())])
        table(
            "merge.py, 311M bf16 pivot + 3 targets, whole process",
            ["what", "wall s", "CPU s", "peak MB", "anonymous MB"],
            rows,
        )
        make(large, 1024, 96)
        table(
            "the same with four times the blocks",
            ["what", "wall s", "CPU s", "peak MB", "anonymous MB"],
            [[m, *run(large, m.split())] for m in METHODS[:3]],
        )


if __name__ == "__main__":
    main()
