"""Loading models and tokenizers with transformers, and knowing which model it was."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat.app import settings
from fusechat.app.errors import UserError
from fusechat.app.outputs import RECORD
from fusechat.app.surroundings import check_place
from fusechat.models.checks import check_complete, check_finite
from fusechat.models.gguf import given, is_gguf, load_gguf
from fusechat.models.whole import check_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CONTENT = {".safetensors", ".bin", ".model", ".json", ".jinja"}  # files that decide what a model is
logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())
SMALL = 64 << 20  # bytes: weight files up to this are hashed whole, larger ones by samples


def load_tokenizer(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A tokenizer by directory, GGUF file or Hub id. Raises `UserError` where there is none."""
    from transformers import AutoTokenizer

    check_place(path)
    check_model(path, weights=False)
    try:
        place, named = given(path)
        return AutoTokenizer.from_pretrained(place, **named, revision=revision, trust_remote_code=trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # whatever transformers, tokenizers and their configs raise for a broken file
        raise UserError(f"no tokenizer at {path!r}: {_reason(error)}") from error


def load_model(
    path: str,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    device_map: str | None = None,
    load_in: str | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Any `AutoModelForCausalLM`, on the CPU unless device, device_map or load_in says otherwise.

    load_in: ``8bit`` or ``4bit`` (bitsandbytes); device_map: accelerate spreads the model; device: all of it goes
    there, unless a device_map says otherwise. Raises `UserError` with the reason.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from fusechat.models.checkpoints import check_shards

    check_place(path)
    settings.check("source", dtype=dtype, load_in=load_in, attn_implementation=attn_implementation)
    options: dict[str, Any] = {"attn_implementation": attn_implementation, "device_map": device_map}
    options = {key: value for key, value in options.items() if value}  # None is no default of transformers
    if load_in:
        quantized = BitsAndBytesConfig(load_in_8bit=load_in == "8bit", load_in_4bit=load_in == "4bit")
        options["quantization_config"] = quantized
        if device and not device_map:
            options["device_map"] = {"": device}  # a quantized model cannot be moved later
    options |= {"dtype": getattr(torch, dtype), "revision": revision, "trust_remote_code": trust_remote_code}
    check_model(path)
    check_shards(Path(path))
    try:
        with torch.device("cpu"):  # transformers takes the device of a block around it for a device_map
            if is_gguf(path):
                model = load_gguf(path, **options)
            else:
                model, loading = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
                check_complete(loading, path)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever transformers, safetensors and configs raise for a broken file
        raise UserError(f"the model {path!r} cannot be loaded: {_reason(error)}") from error
    check_finite(model, path)
    return model if device is None or device_map or load_in else model.to(device)


def empty_model(
    path: str,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The same model as `load_model` gives, on ``meta``: its modules without their weights, of which none is read."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    options |= {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
    return model.eval()


def embedding_rows(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> int | None:
    """Rows of a model's embedding, padding included, as its config says; None where there is only a tokenizer."""
    try:
        config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception:  # whatever transformers raises for a broken file
        return None
    return int(config.get_text_config().vocab_size)


def load_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of a model, a `transformers.PretrainedConfig`; no weights are read."""
    from transformers import AutoConfig

    place, named = given(path)
    return AutoConfig.from_pretrained(place, **named, revision=revision, trust_remote_code=trust_remote_code)


def check_vocabulary(model: PreTrainedModel, tokenizer: Any, path: str) -> None:
    """Raises `UserError` where the tokenizer has ids beyond the model's embedding; a padded embedding is fine."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, the model's embedding {rows} rows; "
            "give the tokenizer the model was trained with, or resize the embedding"
        )


def check_context(config: Any, path: str, max_length: int) -> None:
    """Raises `UserError` where chats of ``max_length`` tokens are longer than the positions of a model's config."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context and max_length > context:
        raise UserError(
            f"chat.max_length={max_length} exceeds the context of {path} ({context}); set chat.max_length={context}"
        )


def model_identity(path: str, revision: str | None = None) -> str:
    """A hash of what the weights, config and tokenizer of a directory or GGUF file are; ``id@revision`` for a Hub id.

    Weight files above 64 MiB count by header, size and sixteen samples of 1 MiB, so that it stays a matter of moments.
    """
    directory = Path(path)
    if is_gguf(path):
        return hashlib.sha256(b"".join(_samples(directory))).hexdigest()[:16]
    if not directory.is_dir():
        return f"{path}@{revision or 'main'}"
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.suffix in CONTENT and file.name != RECORD and not file.name.startswith("."):
            digest.update(f"{file.name}:{file.stat().st_size}:".encode())
            for chunk in _samples(file):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def tokenizer_identity(tokenizer: Any) -> str:
    """A hash of the vocabulary by id and of the chat template."""
    ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps([ordered, tokenizer.chat_template]).encode()).hexdigest()[:16]


def _samples(file: Path) -> Sequence[bytes]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= SMALL:
            return [stream.read()]
        chunks = []
        for part in range(16):
            stream.seek(part * (size - (1 << 20)) // 15)
            chunks.append(stream.read(1 << 20))
        return chunks


def _reason(error: BaseException) -> str:
    """The first line of what transformers says, with the key to turn where it wants to run a stranger's code."""
    if "ignore_mismatched_sizes" in str(error):
        return "its tensors have other shapes than its config.json says; give the config.json that belongs to it"
    text = str(error).strip() or type(error).__name__
    line = next(iter(text.splitlines()))
    if line.startswith("Couldn't instantiate the backend tokenizer"):
        return "none of a tokenizer's files is there; copy tokenizer.json and tokenizer_config.json of the model"
    if line.endswith(":"):
        line = " ".join(text.split())[:300]
    if not isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):
        line = f"{type(error).__name__}: {line}"
    if "trust_remote_code" not in str(error):
        return line
    return f"{line} Add source.trust_remote_code=true (pivot.trust_remote_code=true) only if you trust its authors"
