"""The configs of a pipeline's jobs: composed once each, checked before any of them runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from omegaconf import DictConfig, OmegaConf

from fusechat.app import door
from fusechat.app.errors import UserError
from fusechat.app.hints import config_folders, is_typed, with_near_names
from fusechat.app.naming import named_as_in_a_sweep
from fusechat.pipeline.steps import Step, expand, shown

Compose = Callable[..., DictConfig]  # a job, and those of its overrides that a sweep varies -> its config
MODEL_OF = {"extract": "source.path", "train": "output_dir", "merge": "output_dir", "merge_search": "output_dir"}


def composer(own: Sequence[str]) -> Compose:
    """Composes jobs, each once. own: overrides that all are given.

    That takes a sixth of a second: jobs that differ in ``model`` alone share one composition.
    """
    from hydra import compose
    from hydra.core.override_parser.overrides_parser import OverridesParser

    @cache
    def composed(verb: str, *overrides: str) -> DictConfig:
        config: DictConfig = compose(verb, [*own, *overrides])
        return config

    def config(job: Step, varied: Sequence[str] = ()) -> DictConfig:
        verb, overrides = job
        models = [override for override in overrides if override.startswith("model=")]
        found = composed(verb, *(override for override in overrides if override not in models))
        if models:
            found = found.copy()
            found.model = OverridesParser.create().parse_override(models[-1]).value()
        if varied:
            found = found if models else found.copy()
            named_as_in_a_sweep(found, varied)
        return found

    return config


def jobs(step: Step, compose: Compose) -> Iterator[tuple[Step, DictConfig]]:
    """The jobs of a step with their configs, named as they will be when the step runs."""
    for job in expand(step):
        yield job, compose(job, [text for text in job[1] if text not in step[1]])


def models_of(step: Step, compose: Compose) -> list[str]:
    """The models that a step reads as a source, or makes."""
    key = MODEL_OF.get(step[0])
    with _naming("step ", step):
        return [str(OmegaConf.select(config, key)) for _, config in jobs(step, compose)] if key else []


def check(steps: Sequence[Step], compose: Compose) -> None:
    """Raises `UserError` that names the step where the config of one of its jobs is wrong."""
    checked = set()
    for number, step in enumerate(steps, 1):
        for job in expand(step):
            settings = (job[0], *(override for override in job[1] if not override.startswith("model=")))
            if settings in checked:  # any path may be a model's
                continue
            checked.add(settings)
            with _naming(f"step {number} ", step):
                door.check_config(compose(job), config_folders())


@contextmanager
def _naming(where: str, step: Step) -> Iterator[None]:
    """What is wrong with a step is told with it, as a `UserError`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_typed(error):
            raise UserError(f"{where}({shown(step)}): {with_near_names(error, step[1])}") from error
        raise
