"""wandb's views of docs/sweeps.md: settings against the objective, curves by source, answers beside the pivot's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fusechat.app.columns import BY, LONG, SWEPT
from fusechat.app.errors import UserError
from fusechat.app.tracking import ANSWERS, BEST, MEASURED, STEP, SUMMARIES

CURVES = ("train/sft", "train/fusion", BEST)
WINS = "wins/all/.*"  # a curve a model


def views(entity: str, project: str, experiment: str | None = None) -> list[Any]:
    """Three `wandb_workspaces.workspaces.Workspace`, not sent; of one experiment's runs, or of all of the project."""
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces.expr import Config, Metric, Ordering, Summary

    best = f"{BEST}.{SUMMARIES[BEST]}"
    axes = [*(wr.Config(key) for key in SWEPT), wr.SummaryMetric(best)]
    columns = [wr.ParallelCoordinatesPlotColumn(metric=axis) for axis in axes]
    curves = [wr.LinePlot(title=name, x=STEP, y=[name]) for name in CURVES]
    wins = wr.LinePlot(title="share of the response tokens that each model spoke for", x=STEP, metric_regex=WINS)
    table = wr.WeavePanelSummaryTable(table_name=ANSWERS)
    bars = [wr.BarPlot(title=name, metrics=[wr.SummaryMetric(name)]) for name in MEASURED]
    about = (entity, project, experiment)
    first = [Ordering(Summary(best))]
    return [
        _view(about, "settings", "train", [wr.ParallelCoordinatesPlot(columns=columns)], order=first, wide=1),
        _view(about, "curves by source", "train", [*curves, wins], groupby=[Config(BY)]),
        _view(about, "answers", "evaluate", [table, *bars], order=[Ordering(Metric("Name"))], wide=1),
    ]


def save_views(entity: str | None, project: str, experiment: str | None) -> Iterator[str]:
    """Saves each as a new view; their addresses. entity: None for the account's own.

    Raises `UserError` where wandb does not take one.
    """
    import wandb

    try:
        owner = entity or wandb.Api().default_entity
        if not owner:
            raise UserError("wandb names no account; log in with 'wandb login', or set logger.entity")
        for view in views(owner, project, experiment):
            yield view.save().url
    except wandb.errors.Error as error:
        told = " ".join(str(error).split())
        raise UserError(f"wandb took no view ({told}); log in with 'wandb login', check logger.entity") from error


def _view(about: Sequence[Any], name: str, job: str, panels: Sequence[Any], *, wide: int = 2, **runs: Any) -> Any:
    """A view of one kind of job: a section of panels, ``wide`` beside each other. runs: their order and groups."""
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.expr import Metric, Tags

    entity, project, experiment = about
    chosen = [Metric("JobType") == job, *([Tags().isin([experiment[:LONG]])] if experiment else [])]
    layout = ws.SectionLayoutSettings(columns=wide, rows=len(panels))
    section = ws.Section(name=name, panels=list(panels), is_open=True, layout_settings=layout)
    title = f"{experiment or project}: {name}"
    settings = ws.RunsetSettings(filters=chosen, **runs)
    return ws.Workspace(entity=entity, project=project, name=title, sections=[section], runset_settings=settings)
