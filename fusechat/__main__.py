"""``fusechat VERB …``: every command of the package under one name."""

from __future__ import annotations

import os
import sys

from fusechat.app import help
from fusechat.app.verbs import STARTED, VERBS, module_of, near, plainly


def main() -> None:
    """Becomes ``python -m`` of the verb's module, so that ranks and sweeps start as they do from there."""
    verb, *rest = sys.argv[1:] or ["--help"]
    if help.wanted([verb]):
        plainly(lambda: print(help.overview()))
    elif verb in VERBS:
        os.environ[STARTED] = "1"
        os.execv(sys.executable, [sys.executable, "-m", module_of(verb), *rest])
    else:
        sys.exit(f"error: fusechat has no command {verb!r}{near(verb, list(VERBS))} (fusechat --help lists them)")


if __name__ == "__main__":
    main()
