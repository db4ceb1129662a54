"""What tests of training look at: the weights of targets, the rows of stores, a module over the miniature pivot."""

import torch
from safetensors.torch import load_file

from fusechat.fusion import FusionLoss, FusionRule
from fusechat.fusion.batches import FusionRows
from fusechat.fusion.inputs import open_stores
from fusechat.fusion.module import FusionModule
from tests.conftest import Mini


def weights(world: Mini, name: str) -> dict[str, torch.Tensor]:
    return load_file(world.experiment / "targets" / name / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of any weight."""
    assert a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a)


def moved(world: Mini, name: str) -> float:
    """How far training took a target from the pivot."""
    return distance(weights(world, name), load_file(world.experiment / "world/models/pivot/model.safetensors"))


def rows_of(world: Mini, *sources: str) -> FusionRows:
    """The pivot's store and the sources', zipped."""
    names = sources or ("a",)
    return FusionRows(
        open_stores(world.experiment / "distributions/pivot", [world.experiment / "aligned" / n for n in names]), 0
    )


def module_of(world: Mini, loss: FusionLoss, rule: FusionRule | None = None) -> FusionModule:
    """The pivot, about to be trained on source a."""
    module = FusionModule(str(world.experiment / "world/models/pivot"), ["a"], rule=rule, loss=loss)
    module.configure_model()
    return module
