"""How far a training is, as a Lightning callback. Imported where Lightning is."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.pytorch.callbacks import Callback

from fusechat.app.progress import Progress, progress


class StepsTold(Callback):
    """Shows optimizer steps of the module's ``total_steps()``, with the metrics that are logged for a bar.

    A module that counts its ``tokens`` says so by that name: then tokens a second too.
    """

    def __init__(self, what: str, *, bar: bool = True) -> None:
        self.what, self.bar, self.block = what, bar, ExitStack()
        self.tell: Progress | None = None
        self.step = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins, from the step that a resume has reached."""
        self.step = trainer.global_step
        if trainer.is_global_zero:
            shown = progress(self.what, pl_module.total_steps(), "steps", self.step, bar=self.bar)
            self.tell = self.block.enter_context(shown)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """After a whole step."""
        if self.tell is not None and trainer.global_step > self.step:
            count, self.step = trainer.global_step - self.step, trainer.global_step
            self.tell(count, lambda: self._told(trainer, pl_module))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The bar goes."""
        self.block.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The bar goes."""
        self.block.close()

    def _told(self, trainer: Any, pl_module: Any) -> str:
        texts = [f"{name.rpartition('/')[2]} {float(v):.3f}" for name, v in trainer.progress_bar_metrics.items()]
        if self.tell is not None and (tokens := float(getattr(pl_module, "tokens", 0))):
            texts.append(f"{tokens / max(1e-9, self.tell.seconds):,.0f} tokens/s")
        return ", ".join(texts)
