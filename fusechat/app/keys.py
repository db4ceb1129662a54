"""The keys of each command with default, type and reason, from the YAML files and the schema: nothing is composed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusechat.app.registry import CONF

LINE = re.compile(r"^( *)(?:- )?([\w/]+):(?: +(?!#)(.*?))?(?: +# *(.*))?$")
WHERE = ("output_dir", "overwrite")
TRAINING = (
    *("fusion", "loss", "optimizer", "data", "validation", "lora", "trainer", "callbacks"),
    *("precision_loss", "gradient_checkpointing", "ckpt_path"),
)
OWN: dict[str, tuple[str, ...]] = {  # verb -> keys and sections that it heeds, in the order of its help
    "pipeline": ("pipeline", "models"),
    "tiny": ("tiny", "seed", "output_dir"),
    "preview": ("preview", "pivot.path", "source.name", "source.path", "chat", "alignment.sequence", "output_file"),
    "extract": ("source", "pivot.path", "chat", "extract", "store", *WHERE),
    "align": ("source.name", "token_map", "alignment", "store", *WHERE),
    "train": ("pivot", "source.name", "sources", "run_name", *TRAINING, *WHERE),
    "merge": ("pivot.path", "targets", "target", "merge", *WHERE),
    "merge_search": ("search", "pivot.path", "targets", "chat.path", *WHERE),
    "mutual": (
        *("mutual", "pivot.path", "chat.path", "chat.max_length", "fusion", "loss", "optimizer"),
        *("lora.r", "lora.lora_alpha", "lora.target_modules"),  # it sets the others itself
        *("data.global_batch", "trainer.max_epochs", "validation", "extract.top_k", "token_map", "alignment", *WHERE),
    ),
    "evaluate": ("model", "evaluation", "output_file", "overwrite"),
    "report": ("runs", "report", "output_dir"),
    "compare": ("first", "second", "output_file"),
    "judge": ("answers", "baseline", "questions", "judge", "output_file", "overwrite"),
    "publish": ("model", "repo", "publish"),
}


@dataclass(frozen=True)
class Key:
    """name: dotted; default: as the YAML has it; why: its comment."""

    name: str
    default: str
    why: str


def keys_of(verb: str) -> list[Key]:
    """The keys that a command heeds, its own first."""
    common, found = _keys(CONF / "common.yaml"), list[Key]()
    for group, option in _defaults().items():
        if option != "null":
            found += [Key(f"{group}.{key.name}", key.default, key.why) for key in _option(CONF / group, option)]
    known = {key.name: key for key in [*found, *common, *_keys(CONF / f"{verb}.yaml")]}
    return [key for part in OWN[verb] for name, key in known.items() if name == part or name.startswith(f"{part}.")]


def groups_of(verb: str) -> dict[str, str]:
    """Config groups whose keys a command heeds -> the option that is taken unless another is named."""
    return {group: option for group, option in _defaults().items() if group in OWN[verb]}


def kind_of(name: str) -> Any:
    """The type of a dotted key in the schema; None where it is open."""
    from typing_extensions import is_typeddict

    from fusechat.app.schema import Config
    from fusechat.app.settings import fields

    kind: Any = Config
    for part in name.split("."):
        kind = fields(kind).get(part) if is_typeddict(kind) else None
    return kind


def _defaults() -> dict[str, str]:
    """Group -> option, as the defaults list of common.yaml has them."""
    lines = (CONF / "common.yaml").read_text(encoding="utf-8").splitlines()
    matches = [LINE.match(line) for line in lines if line.startswith("  - ")]
    return {found[2]: found[3] for found in matches if found}


def _option(folder: Path, option: str) -> Iterator[Key]:
    """The keys of a group's option, with those of the files that it begins from."""
    file = folder / f"{option}.yaml"
    above = re.search(r"^defaults: *\[(\w+)", file.read_text(encoding="utf-8"), re.M)
    own = {key.name: key for key in _keys(file)}
    inherited = {key.name: key for key in _option(folder, above[1])} if above else {}
    yield from (inherited | own).values()


def _keys(file: Path) -> list[Key]:
    """The keys of one file; of a mapping in lines of its own its inner ones."""
    found, sections = list[Key](), list[tuple[int, str]]()
    for line in file.read_text(encoding="utf-8").splitlines():
        if (match := LINE.match(line)) is None or match[2] == "defaults" or line.lstrip().startswith("- "):
            continue
        depth = len(match[1])
        sections = [(at, name) for at, name in sections if at < depth]
        name = ".".join([*(section for _, section in sections), match[2]])
        if match[3]:
            found.append(Key(name, match[3], match[4] or ""))
        else:
            sections.append((depth, match[2]))
    return found
