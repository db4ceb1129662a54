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

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fusechat.app.errors import UserError
from fusechat.app.registry import Family

if TYPE_CHECKING:
    from fusechat.chats.render import ChatRenderer
    from fusechat.evaluate.speakers import Speaker
    from fusechat.stores.served.server import Server

EVALUATIONS = Family("evaluation.kind")
Sample = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """The model to evaluate (directory or Hub id), the name of its result, the kind's own settings, and the seed.

    server: where the model runs, if not here; of ``model`` only tokenizer and config are read then.
    """

    model: str
    name: str
    settings: Mapping[str, Any]
    seed: int
    server: Server | None = None

    def load(self) -> tuple[Any, Any]:
        """The model on its device, and a renderer with its own tokenizer and the template that the settings name.

        Raises `UserError` for a model behind a server.
        """
        from fusechat.models import load as models
        from fusechat.models.devices import device_of

        self.refuse_server()
        chosen, renderer = self.settings, self.renderer()
        device = device_of(chosen.get("device") or "auto", "evaluation.device")
        loading = {"dtype": chosen.get("dtype", "float32"), "device_map": chosen.get("device_map")}
        model = models.load_model(self.model, **loading, device=device, trust_remote_code=self.trust)
        models.check_vocabulary(model, renderer.tokenizer, self.model)
        return model, renderer

    @contextmanager
    def speaker(self) -> Iterator[Speaker]:
        """The model, wherever it runs, for the time of a block."""
        from fusechat.evaluate.speakers import Here, There

        if self.server is None:
            yield Here(*self.load(), self.settings, self.seed)
            return
        renderer, limit = self.renderer(), self.settings["max_new_tokens"]
        given: dict[str, Any] = {"tokens": renderer.max_length, "trust_remote_code": self.trust}
        with self.server.asked(renderer.tokenizer, self.model, kept="what is measured is kept", **given) as asked:
            yield There(asked, self.server, renderer, limit=limit, stops=self._stop_tokens(renderer), seed=self.seed)

    def refuse_server(self) -> None:
        """Raises `UserError` where the model is behind a server, for kinds that want the model itself."""
        if self.server is not None:
            raise UserError(
                f"evaluation.kind={self.settings['kind']} wants the model itself, and evaluation.engine="
                f"{self.server.engine} gives what it says; set evaluation.engine=transformers"
            )

    def renderer(self) -> ChatRenderer:
        """A renderer of chats with the model's tokenizer, without the model. Raises `UserError` for no template."""
        from fusechat.chats.render import renderer_for
        from fusechat.models.load import load_tokenizer

        tokenizer = load_tokenizer(self.model, trust_remote_code=self.trust)
        template, max_length = self.settings.get("template", "native"), self.settings.get("max_length", 2048)
        if template == "pivot" or (template == "native" and not tokenizer.chat_template):
            raise UserError(
                f"the tokenizer of {self.model} has no chat template; give one with evaluation.template='<jinja>' or "
                "evaluation.template=plain, on the command line also evaluation.template=pivot"
            )
        return renderer_for(tokenizer, tokenizer, template, max_length)

    def stops(self) -> dict[str, list[int]]:
        """The tokens that end an answer: part of what decides it. Nothing where the tokenizer's own is the only one.

        So what was made when no other was looked for stays what it is.
        """
        renderer = self.renderer()
        found = self._stop_tokens(renderer)
        return {} if found == [renderer.tokenizer.eos_token_id] else {"stops": found}

    def _stop_tokens(self, renderer: ChatRenderer) -> list[int]:
        from transformers import AutoConfig, GenerationConfig

        from fusechat.evaluate.generation import stop_tokens
        from fusechat.models.gguf import given

        place, named = given(self.model)
        try:
            config = GenerationConfig.from_pretrained(self.model)
        except OSError:  # the model has none: as transformers makes one
            config = AutoConfig.from_pretrained(place, **named, trust_remote_code=self.trust)
        return stop_tokens(renderer, config)

    @property
    def trust(self) -> bool:
        """Whether code of the model's authors is run."""
        return bool(self.settings.get("trust_remote_code", False))


@dataclass(frozen=True)
class Work:
    """What an evaluation would do, told before it is done: a result that is there and fits is kept.

    measure: writes what a kill must not lose to the file that it is given, and goes on after what that holds. Returns
    the result's own keys, ``samples`` among them: one dictionary a sample with its id, its tag (a skill, a task or "")
    and numbers, whose means become metrics; nats, bytes and tokens become bits per byte and nats per token.
    inputs: what decides the result beside model, settings and seed, such as files' hashes; part of the fingerprint.
    read: more of that which the model's files decide and takes a while to read; not asked for again where the result
    that is there is of the same model, settings, seed and inputs.
    known: settings that name files of which inputs say what they hold: where these lie decides nothing.
    answers: where the samples are answers that other tools' judges read, the form of their file: JSON lines or a list.
    """

    measure: Callable[[Path], Mapping[str, Any]]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[], Mapping[str, Any]] = dict
    answers: Literal["lines", "list"] | None = None
    known: Sequence[str] = ()
