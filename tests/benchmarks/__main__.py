"""All benchmarks, or those named: python -m tests.benchmarks loss merging"""

import importlib
import sys

NAMES = [
    "loss",
    "step",
    "packing",
    "trainer",
    "data",
    "alignment",
    "alignment_stage",
    "extraction",
    "scale",
    "budget",
    "merging",
    "startup",
]

if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        importlib.import_module(f"tests.benchmarks.{name}").main()
