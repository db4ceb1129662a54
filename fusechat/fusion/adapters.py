"""Low-rank adapters (LoRA, arXiv 2106.09685) over the pivot: made, kept beside a target, gone on from, and merged."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.app.outputs import read_json
from fusechat.fusion.training import ADAPTER
from fusechat.models import load as models
from fusechat.models.whole import ADAPTER_CONFIG, ADAPTER_WEIGHTS

NOT_PEFT = ("enabled", "adapter")  # keys of the section that are ours
SCALED = (
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "alpha_pattern",
)  # peft's options by which the same tensors are another model


def with_adapters(model: Any, lora: Mapping[str, Any]) -> Any:
    """The model with low-rank adapters in fp32, which alone are trained.

    lora: options of `peft.LoraConfig`, and ``adapter``, the folder of those that training goes on from, if any. Raises
    `UserError` where these are of other shapes.
    """
    import peft

    options = {key: value for key, value in lora.items() if key not in NOT_PEFT}
    try:
        made = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    except ValueError as error:  # modules that are not there, dropout that experts cannot have
        raise UserError(f"lora does not fit {model.name_or_path}: {str(error).splitlines()[0]}") from error
    if lora.get("adapter"):
        _fill(made, Path(lora["adapter"]))
    return made


def adapter_tensors(model: Any, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapters of a model by the names that peft gives them in a file. state: the model's, if in shards."""
    from peft.utils.save_and_load import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def save_adapters(model: Any, state: Mapping[str, Tensor] | None, directory: Path) -> None:
    """Writes the adapters as peft does, a folder that `PeftModel.from_pretrained` and ``merge.py`` read."""
    from safetensors.torch import save_file

    config = copy(model.peft_config["default"])
    if isinstance(config.target_modules, set):  # in an order of its own in every process
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(directory)
    save_file(adapter_tensors(model, state), directory / ADAPTER_WEIGHTS, {"format": "pt"})


def merged_adapters(
    path: str, loading: Mapping[str, Any], lora: Mapping[str, Any], adapters: Mapping[str, Tensor]
) -> Any:
    """The pivot, loaded once more in fp32 at least, with trained adapters added to its weights: W + B A scale."""
    exact = torch.promote_types(getattr(torch, loading["dtype"]), torch.float32)
    loading = {**loading, "dtype": str(exact).removeprefix("torch."), "load_in": None}
    model = with_adapters(models.load_model(path, **loading), lora)
    unknown = model.load_state_dict(adapters, strict=False).unexpected_keys
    assert not unknown, unknown
    return model.merge_and_unload()


def export(path: str, lora: Mapping[str, Any], given: Mapping[str, Tensor] | None, directory: Path) -> None:
    """Writes what an adapter makes of its base, with tokenizer and adapter, as a target holds them; in fp32.

    given: the adapter's tensors by peft's names; None: as they begin, by torch's random generator. Raises `UserError`
    where these are of other shapes.
    """
    model = with_adapters(models.load_model(path), {**lora, "adapter": None})
    if given is not None:
        _take(model, given, "the adapter")
    save_adapters(model, None, directory / ADAPTER)
    model.merge_and_unload().save_pretrained(directory)
    models.load_tokenizer(path).save_pretrained(directory)


def _fill(model: Any, folder: Path) -> None:
    from safetensors.torch import load_file

    what, made = f"lora.adapter={folder}", model.peft_config["default"].to_dict()
    told = read_json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).is_file() else {}
    for key in SCALED:
        if key in told and told[key] != made.get(key):
            raise UserError(f"{what} was trained with {key}={told[key]}, {made[key]} now; set lora.{key} as it was")
    _take(model, load_file(folder / ADAPTER_WEIGHTS), what)


def _take(model: Any, given: Mapping[str, Tensor], what: str) -> None:
    from peft.utils.save_and_load import set_peft_model_state_dict

    shapes = [{name: tuple(t.shape) for name, t in of.items()} for of in (adapter_tensors(model), given)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(name) != shapes[1].get(name):
            told = f"{name} is {shapes[1].get(name)} there, {shapes[0].get(name)} by lora.r and lora.target_modules"
            raise UserError(f"{what} does not fit: {told}; set them as they were")
    set_peft_model_state_dict(model, dict(given))
