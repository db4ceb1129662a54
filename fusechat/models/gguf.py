"""GGUF files (llama.cpp's): models in one file, tokenizer and chat template inside, read with transformers.

A path that ends in ``.gguf`` is taken wherever a model's is: ``source.path=FILE.gguf``, ``model=FILE.gguf``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat.app.errors import UserError
from fusechat.app.outputs import whole_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_gguf(path: str) -> bool:
    """Whether a path is that of a GGUF file that is there."""
    return path.endswith(".gguf") and Path(path).is_file()


def given(path: str) -> tuple[str, dict[str, str]]:
    """What transformers is given for a model's path: a directory or Hub id as it is; a GGUF file's folder and name."""
    return (str(Path(path).parent), {"gguf_file": Path(path).name}) if is_gguf(path) else (path, {})


def check_plain(path: str | Path, role: str) -> None:
    """Raises `UserError` where a GGUF file is given for what has to be a directory. role: its key."""
    if is_gguf(str(path)):
        code = f"from pathlib import Path as P; from fusechat.models.gguf import *; write_plain('{path}', P('DIR'))"
        raise UserError(
            f"{role}={path} is a GGUF file, whose weights are rounded, and has to be a Hugging Face directory; write "
            f'one with: python -c "{code}"'
        )


def load_gguf(path: str, **options: Any) -> PreTrainedModel:
    """The model of a GGUF file as a plain one, its weights unpacked. options: of ``from_pretrained``.

    Raises `UserError` where the package ``gguf`` is missing, or a quantization besides the file's own is asked for.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    if "quantization_config" in options:
        raise UserError(f"{path} is quantized already; set source.load_in=null")
    folder, named = given(path)
    try:
        unpacked = GgufConfig(dequantize=True)
        packed: Any = AutoModelForCausalLM.from_pretrained(folder, **named, **options, quantization_config=unpacked)
    except ImportError as error:
        raise UserError(f"{path} needs the package gguf: pip install 'fusechat[gguf]'") from error
    if options.get("device_map"):
        return packed  # type: ignore[no-any-return]
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # else whoever saves or trains it takes it for a quantized one
    attention = {key: options[key] for key in ("attn_implementation",) if key in options}
    plain: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=options["dtype"], **attention)
    plain.load_state_dict(packed.state_dict())
    plain.generation_config = packed.generation_config
    return plain


def described(path: str | Path) -> str:
    """What a GGUF file's header says of it, in a line: name, architecture, licence, kind of quantization.

    What it does not say is told as missing: many files name no licence. Raises `UserError`.
    """
    try:
        from gguf import GGUFReader, LlamaFileType
    except ImportError as error:
        raise UserError(f"{path} needs the package gguf: pip install 'fusechat[gguf]'") from error
    try:
        fields = GGUFReader(path).fields
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path} is no whole GGUF file ({error}); get it again") from error
    name, architecture, licence, kind = (
        fields[key].contents() if key in fields else None
        for key in ("general.name", "general.architecture", "general.license", "general.file_type")
    )
    known: dict[Any, str] = {member.value: member.name.removeprefix("MOSTLY_") for member in LlamaFileType}
    return (
        f"{name or 'unnamed'} ({architecture}), licence {licence or 'not named in the file'}, "
        f"quantization {known.get(kind, 'not named in the file')}"
    )


def write_plain(path: str, directory: Path, dtype: str = "float32") -> None:
    """Writes a GGUF file's model and tokenizer out as a plain Hugging Face directory, whole or not at all.

    So that it can be a pivot, whose directory is trained on and merged into. Raises `UserError`.
    """
    from fusechat.models.load import load_model, load_tokenizer

    model, tokenizer = load_model(path, dtype=dtype), load_tokenizer(path)
    with whole_directory(directory) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
