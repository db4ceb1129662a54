"""wandb's views: that they name what runs log, and are saved where that is asked for."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from fusechat.app.errors import UserError
from tests.app.runs import Run, followed
from tests.conftest import Mini


def keys_of_view(tree: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """Where a view's spec names something that runs log, and what."""
    if isinstance(tree, dict):
        if {"section", "name"} == set(tree):
            yield at, f"{tree['section']}:{tree['name']}"
        for key, value in tree.items():
            yield from keys_of_view(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from keys_of_view(value, at)
    elif at in ("accessor", "metrics", "xAxis", "metricRegex") or (at == "val" and "/" in str(tree)):
        yield at, str(tree)


def is_logged(name: str, run: Run) -> bool:
    """Whether a run has what a view names, in whichever of wandb's spellings."""
    section, _, key = name.rpartition(":")
    if section == "config":
        return key.replace(".value.", ".", 1) in run.columns
    if section == "summary" or key.startswith("summary_metrics."):
        return key.removeprefix("summary_metrics.") in run.summary
    return section == "run" or any(re.fullmatch(key, logged) for logged in ("_step", *run.history, *run.media))


def test_the_views_name_what_runs_log(fresh: Mini) -> None:
    """The specs, not sent, beside offline runs of the two kinds of job that they show."""
    from fusechat.app.workspace import views

    train = followed(fresh, "train", "source=a", "trainer.max_steps=2", "trainer.log_every_n_steps=1")
    evaluate = followed(fresh, "evaluate", f"model={fresh.experiment}/targets/a")
    made = views("me", "fusechat", "tiny")
    assert [view.name for view in made] == ["tiny: settings", "tiny: curves by source", "tiny: answers"]
    named = set()
    for view, run in zip(made, (train, train, evaluate), strict=True):
        spec = view._to_model().spec.model_dump(by_alias=True, exclude_none=True)["section"]
        (runs,) = spec["runSets"]
        asked = {item["key"]["name"]: item["value"] for item in runs["filters"]["filters"]}
        assert asked == {"jobType": run.about.job_type, "tags": ["tiny"]} and "tiny" in run.about.tags
        keys = [name for _, name in keys_of_view(spec)]
        assert len(keys) > 5 and not [name for name in keys if not is_logged(name, run)]
        named |= set(keys)
    assert {"config:loss.value.lm_weight", "config:fusion.value.rule", "summary:validation/bits_per_byte.min"} <= named
    assert {"train/sft", "train/fusion", "wins/all/.*", "config:source.value.name", "evaluation/answers"} <= named
    assert not is_logged("config:loss.value.lm_weigth", train) and not is_logged("train/stf", train)
    everywhere = views("me", "fusechat")[0]
    assert everywhere.name == "fusechat: settings"
    assert everywhere.runset_settings.filters == """Metric("JobType") == 'train'"""


def test_views_are_saved_where_wandb_is_asked_for(monkeypatch: pytest.MonkeyPatch, fresh: Mini) -> None:
    import wandb
    import wandb_workspaces.workspaces as ws

    from fusechat.app import workspace

    with pytest.raises(UserError) as error:
        fresh.run("report", "report.workspace=true")
    told = "report.workspace=true saves views in wandb's project; add logger=wandb, after 'wandb login'"
    assert str(error.value) == told
    monkeypatch.setattr(ws.Workspace, "save", lambda self: setattr(self, "_internal_name", "nw-1-v") or self)
    monkeypatch.setattr(ws.Workspace, "url", property(lambda self: f"{self.entity}/{self.project}/{self.name}"))
    assert [*workspace.save_views("me", "p", None)][2] == "me/p/p: answers"

    def refuse(self: Any) -> None:
        raise wandb.errors.CommError("no such\nentity")

    monkeypatch.setattr(ws.Workspace, "save", refuse)
    with pytest.raises(UserError) as error:
        [*workspace.save_views("me", "p", None)]
    assert str(error.value) == "wandb took no view (no such entity); log in with 'wandb login', check logger.entity"
