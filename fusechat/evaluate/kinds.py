"""What an evaluation is: a function that is given a `Job` and says what `Work` it would do.

One of ten lines in a module of your own, chosen by ``evaluation.kind=parameters 'imports=[my_module]'``:

    @EVALUATIONS.register("parameters", "size of each tensor")
    def parameters(job: Job) -> Work:
        def measure(part):
            model = job.load()[0]
            return {"samples": [{"id": name, "tag": "", "size": p.numel()} for name, p in model.named_parameters()]}

        return Work(measure)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fusechat.app.registry import Family

EVALUATIONS = Family("evaluation.kind")
Sample = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """The model to evaluate (directory or Hub id), the name of its result, the kind's own settings, and the seed."""

    model: str
    name: str
    settings: Mapping[str, Any]
    seed: int

    def load(self) -> tuple[Any, Any]:
        """The model, and a renderer of chats with its own tokenizer and the template that the settings name."""
        from fusechat.chats.render import renderer_for
        from fusechat.models import load as models

        chosen, trust = self.settings, bool(self.settings.get("trust_remote_code", False))
        tokenizer = models.load_tokenizer(self.model, trust_remote_code=trust)
        renderer = renderer_for(tokenizer, tokenizer, chosen.get("template", "native"), chosen.get("max_length", 2048))
        dtype, device_map = chosen.get("dtype", "float32"), chosen.get("device_map")
        model = models.load_model(self.model, dtype=dtype, device_map=device_map, trust_remote_code=trust)
        models.check_vocabulary(model, tokenizer, self.model)
        return model, renderer


@dataclass(frozen=True)
class Work:
    """What an evaluation would do, told before it is done: a result that is there and fits is kept.

    measure: writes what a kill must not lose to the file that it is given, and goes on after what that holds. Returns
    the result's own keys, ``samples`` among them: one dictionary a sample with its id, its tag (a skill, a task or "")
    and numbers, whose means become metrics; nats, bytes and tokens become bits per byte and nats per token.
    inputs: what decides the result beside model, settings and seed, such as files' hashes; part of the fingerprint.
    answers: where the samples are answers that other tools' judges read, the form of their file: JSON lines or a list.
    """

    measure: Callable[[Path], Mapping[str, Any]]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    answers: Literal["lines", "list"] | None = None
