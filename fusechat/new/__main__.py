"""Write an experiment of your own: models and chats are looked at, and what it will take is told.

python -m fusechat.new mine pivot=DIR 'sources={a: DIR, b: DIR}' chats=FILE
"""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from fusechat.app import session
from fusechat.app.errors import UserError
from fusechat.app.streams import Parser
from fusechat.app.verbs import as_typed, plainly
from fusechat.new.asked import KEYS, NEEDED, Asked, asked


def make(own: Asked) -> None:
    """Looks at everything, writes the experiment, and says what it will take."""
    with session.session():  # before libraries are imported, which heed what it sets
        from fusechat.new.starting import starting

        start = starting()  # before what it measures is imported
        from fusechat.new.telling import tell
        from fusechat.new.work import looked

        tell(own, *looked(own, start))


def parser() -> Parser:
    """The command line."""
    needed = " ".join(f"{key}={text}" for key, text in NEEDED.items())
    made = Parser(
        prog="python -m fusechat.new",
        usage=as_typed(f"python -m fusechat.new NAME {needed} [KEY=VALUE ...]"),
        description=(__doc__ or "").splitlines()[0],
        epilog="\n".join(["keys:", *(f"  {key:11} {text}" for key, text in KEYS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("name", help="of the experiment: of its file, and of its folder of outputs")
    made.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="see below")
    return made


def asked_for(name: str, settings: Sequence[str]) -> Asked:
    """``KEY=VALUE`` as checked values. Raises `UserError`."""
    typed = shlex.join(settings)
    try:
        given: Any = OmegaConf.to_container(OmegaConf.from_dotlist([*settings]))
    except Exception as error:  # OmegaConf lets YAML's errors through
        raise UserError(f"{typed} cannot be read ({str(error).splitlines()[0]}); see --help") from error
    return asked(name, given, typed)


def main() -> None:
    """Makes an experiment as ``sys.argv`` asks for it; a mistake is one line."""
    logging.basicConfig(format="%(message)s")

    def run() -> None:
        given = parser().parse_args()
        make(asked_for(given.name, given.settings))

    plainly(run)


if __name__ == "__main__":
    main()
