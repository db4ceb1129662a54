"""``--help`` of every command, from YAML files and docstrings alone: no config is composed, no step imported."""

from __future__ import annotations

import itertools
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from fusechat.app import keys, registry
from fusechat.app.schema import words
from fusechat.app.verbs import VERBS, about, as_typed

OURS = ("hydra", "paths")  # folders of conf/ that hold nothing to choose from
COLUMN, WIDTH = 40, 120  # where the text behind a key begins, and where a line ends
MORE = """\
Every command has also: experiment=NAME, preset=NAME, seed, overwrite, wait, verify, imports, paths.root, logger.
--help all lists every group with its options, and every loss, rule, token map, merge method, ... by name."""
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


def text(verb: str, folders: Sequence[Path] = (), everything: bool = False) -> str:
    """Help of one command: examples, and the keys that it heeds. folders: config folders of the user's own
    (``--config-dir``). everything: all groups with their options, and the members of all families, instead of keys.
    """
    header = "\n".join(f"  {as_typed(line)}" for line in _header(registry.CONF / f"{verb}.yaml"))
    parts = [about(verb), header]
    if everything:
        return "\n\n".join([*parts, *_everything(folders), FOOTER])
    groups, told = keys.groups_of(verb), dict[str, list[str]]()
    for key in keys.keys_of(verb):
        told.setdefault(key.name.partition(".")[0], []).append(_key(key))
    for group, option in groups.items():
        told[group].insert(0, _entry(f"{group}={option}", f"one of {', '.join(_options(group, folders))}"))
    listed = "\n".join(line for lines in told.values() for line in lines)
    return "\n\n".join([*parts, f"Keys, with what holds unless they are given:\n{listed}", MORE, FOOTER])


def examples(verb: str) -> list[str]:
    """The commands that a verb's help begins with."""
    lines = [re.split(r" {3,}", line)[0] for line in _header(registry.CONF / f"{verb}.yaml")]
    return [line for line in lines if line.startswith("python ")]


def _key(key: keys.Key) -> str:
    """A key with its default, the reason that its file gives, and its type where that says more."""
    kind = keys.kind_of(key.name)
    options = [] if kind is None else words.options_of(kind)
    told = options and all(option in key.why for option in options)
    type_ = "" if kind is None or told or words.bare(kind)[0] is str else f"[{words.expected(kind)}]"
    return _entry(f"{key.name}={key.default}", f"{key.why} {type_}".strip())


def _entry(given: str, says: str) -> str:
    """``key=default`` and, from one column on, what it is."""
    first, indent = f"  {given:{COLUMN - 4}}  ", " " * COLUMN
    beside = len(first) == COLUMN
    text = textwrap.fill(says, WIDTH, initial_indent=first if beside else indent, subsequent_indent=indent)
    return (text or first if beside else f"{first}\n{text}").rstrip()


def _everything(folders: Sequence[Path]) -> list[str]:
    """All groups with their options, and all families with their members."""
    parts = ["Groups (group=option):", *(_group(name, folders) for name in _groups(folders))]
    families = {key: list(registry.choices(key, folders)) for key in registry.GROUPS}
    chosen = "\n".join(f"  {key}: {', '.join(names)}" for key, names in families.items() if names)
    return [*parts, f"Keys that choose by name:\n{chosen}"]


def folders_of(arguments: Sequence[str]) -> list[Path]:
    """The values of ``--config-dir`` and ``-cd`` on a command line."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    given = [after for flag, after in pairs if flag in ("--config-dir", "-cd")]
    return [
        Path(folder) for folder in given + [a.partition("=")[2] for a in arguments if a.startswith("--config-dir=")]
    ]


def main(verb: str) -> None:
    """Prints the help of a command as ``sys.argv`` asks for it."""
    print(text(verb, folders_of(sys.argv), everything="all" in sys.argv))


def _groups(folders: Sequence[Path]) -> list[str]:
    found = {folder.name for conf in (registry.CONF, *folders) for folder in conf.iterdir() if folder.is_dir()}
    return sorted(found - set(OURS), key=lambda name: (name != "experiment", name))


def _group(name: str, folders: Sequence[Path]) -> str:
    options = _options(name, folders)
    width = max(map(len, options), default=0)
    return "\n".join([f"  {name}", *(f"    {option:{width}}  {line}".rstrip() for option, line in options.items())])


def _options(name: str, folders: Sequence[Path]) -> dict[str, str]:
    """The options of a group, each with its line."""
    files = [file for conf in (registry.CONF, *folders) for file in sorted((conf / name).glob("*.yaml"))]
    return {file.stem: _line(file) for file in files if file.stem != "common"}


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
