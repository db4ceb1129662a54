"""``--help`` of every command, from YAML files and docstrings alone: no config is composed, no step imported."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fusechat.app import registry
from fusechat.app.verbs import VERBS, about, as_typed

OURS = ("hydra", "paths")  # folders of conf/ that hold nothing to choose from
FOOTER = """\
Any value can be overridden: group=option picks a file, a.b=value sets a key, -m sweeps over commas and ranges.
--cfg job prints every key with its value; --config-dir DIR adds a folder of your own files beside conf/;
imports=[my_module] brings members of your own; HYDRA_FULL_ERROR=1 shows tracebacks; --hydra-help is Hydra's own."""


def wanted(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return bool({"-h", "--help"} & set(arguments))


def overview() -> str:
    """Every command with its line, for ``fusechat --help``."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {about(verb)}" for verb in VERBS)
    title = "fusechat VERB [overrides]: fuse chat LLMs of different architecture, size and tokenizer into one"
    return f"{title}\n\n{verbs}\n\nfusechat VERB --help says more."


def text(verb: str, folders: Sequence[Path] = ()) -> str:
    """Help of one command. folders: config folders of the user's own (``--config-dir``)."""
    commands = _header(registry.CONF / f"{verb}.yaml")
    parts = [about(verb), "\n".join(f"  {as_typed(line)}" for line in commands), "Groups (group=option):"]
    parts += [_group(name, folders) for name in _groups(folders)]
    families = {key: list(registry.choices(key, folders)) for key in registry.GROUPS}
    chosen = "\n".join(f"  {key}: {', '.join(names)}" for key, names in families.items() if names)
    return "\n\n".join([*parts, f"Keys that choose by name:\n{chosen}", FOOTER])


def folders_of(arguments: Sequence[str]) -> list[Path]:
    """The values of ``--config-dir`` and ``-cd`` on a command line."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    given = [after for flag, after in pairs if flag in ("--config-dir", "-cd")]
    return [
        Path(folder) for folder in given + [a.partition("=")[2] for a in arguments if a.startswith("--config-dir=")]
    ]


def main(verb: str) -> None:
    """Prints the help of a command as ``sys.argv`` asks for it."""
    print(text(verb, folders_of(sys.argv)))


def _groups(folders: Sequence[Path]) -> list[str]:
    found = {folder.name for conf in (registry.CONF, *folders) for folder in conf.iterdir() if folder.is_dir()}
    return sorted(found - set(OURS), key=lambda name: (name != "experiment", name))


def _group(name: str, folders: Sequence[Path]) -> str:
    files = [file for conf in (registry.CONF, *folders) for file in sorted((conf / name).glob("*.yaml"))]
    options = {file.stem: _line(file) for file in files if file.stem != "common"}
    width = max(map(len, options), default=0)
    return "\n".join([f"  {name}", *(f"    {option:{width}}  {line}".rstrip() for option, line in options.items())])


def _header(file: Path) -> list[str]:
    """The comment lines that a file begins with."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")]
    return [line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]


def _line(file: Path) -> str:
    """The one line of help that a file begins with: after ``group=option:``, or after the command that uses it."""
    first = next(iter(_header(file)), "")
    if re.match(r"\w+=\w+: ", first):
        return first.partition(": ")[2]
    return re.split(r" {3,}", first)[-1]
