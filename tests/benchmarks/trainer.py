"""SFT against transformers' Trainer: the same batches, weights and rates, side by side in one process.

python -m tests.benchmarks.trainer         SmolLM2-135M's shape, random weights, 8 chats of 140 tokens, one thread
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers

from fusechat.app.trainer import quiet_trainer
from fusechat.fusion.batches import FusionBatch
from fusechat.fusion.callbacks import make_callbacks
from fusechat.fusion.data import FusionDataModule
from fusechat.fusion.losses import FusionLoss
from fusechat.fusion.module import FusionModule
from fusechat.fusion.options import Callbacks, Data, Optimizer
from fusechat.models.heads import OutputHead
from tests.benchmarks.data import store
from tests.benchmarks.measure import measure, table

CHATS, TOKENS, RESPONSE, STEPS, SHAPE = 8, 140, 0.55, 6, (576, 30, 1536, 9, 3, 49_152)
IGNORED = -100  # labels that transformers' loss leaves out


def model(shape: tuple[int, ...]) -> Any:
    """A Llama with tied embeddings, the same random weights each time. shape: hidden, layers, MLP, heads, KV heads, V."""
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = transformers.LlamaConfig(**dict(zip((*names, "vocab_size"), shape, strict=True)), tie_word_embeddings=True)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).train()


class Clock:
    """CPU seconds of each step."""

    def __init__(self) -> None:
        self.began, self.seconds, self.losses = 0.0, list[float](), list[float]()

    def start(self) -> None:
        """A step begins."""
        self.began = time.process_time()

    def stop(self) -> None:
        """It has ended, the optimizer included."""
        self.seconds.append(time.process_time() - self.began)


class OurClock(lightning.Callback):
    """Lightning tells the clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_start(self, *_: Any) -> None:
        """A batch is there."""
        self.clock.start()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """The optimizer has stepped."""
        self.clock.stop()
        self.clock.losses.append(float(trainer.callback_metrics["train/sft"]))


class TheirClock(transformers.TrainerCallback):
    """transformers tells the clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """A batch is there."""
        self.clock.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The optimizer has stepped."""
        self.clock.stop()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """The mean loss of a step."""
        self.clock.losses += [logs["loss"]] if "loss" in logs else []


def ours(module: FusionModule, data: FusionDataModule, steps: int, clock: Clock, folder: Path) -> Any:
    """Trains as train.py does, with its callbacks."""
    callbacks = make_callbacks(Callbacks(checkpoint_every_n_steps=None, progress_bar=False), folder, False, None)
    options = {"accelerator": "cpu", "devices": 1, "max_steps": steps, "max_epochs": -1, "gradient_clip_val": 1.0}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    kept = [callback for callback in callbacks if not isinstance(callback, lightning.pytorch.callbacks.Checkpoint)]
    trainer = quiet_trainer(options, [*kept, OurClock(clock)])
    return lambda: trainer.fit(module, datamodule=data)


def theirs(network: Any, batches: list[FusionBatch], clock: Clock, folder: Path, lr: float) -> Any:
    """transformers' Trainer as it comes (fused AdamW), with the same rates, schedule and clipping."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=len(batches[0].input_ids),
        max_steps=len(batches),
        learning_rate=lr,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    rows = [row for batch in batches for row in labelled(batch)]
    trainer = transformers.Trainer(
        network, arguments, train_dataset=rows, data_collator=stacked, callbacks=[TheirClock(clock)]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer.train


def labelled(batch: FusionBatch) -> list[dict[str, torch.Tensor]]:
    """Its chats as transformers has them: labels where the assistant speaks."""
    labels = torch.full_like(batch.input_ids, IGNORED)
    labels.view(-1)[batch.at + 1] = batch.gold
    columns = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}
    return [{name: column[row] for name, column in columns.items()} for row in range(len(labels))]


def stacked(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Chats of one length together."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def compared(shape: tuple[int, ...], steps: int, folder: Path) -> list[list[Any]]:
    """A line for each: loss of the last step, CPU seconds a step without the first, peak megabytes, and ratios."""
    made = store(folder / "store", "float16", RESPONSE, [TOKENS] * (steps * CHATS))
    settings = Data(global_batch=CHATS, validation_fraction=0.0, bucket=1)
    data = FusionDataModule([made], settings, max_tokens=TOKENS, vocab_size=shape[-1], pad_token_id=0)
    optimizer = Optimizer(lr=1e-3, warmup_ratio=0.0)
    clocks, peaks = (Clock(), Clock()), []

    def trained(work: Callable[[], Any]) -> None:
        peaks.append(measure(work, lambda: None, repeats=1, warm=False).megabytes)

    module = FusionModule("", [], loss=FusionLoss(lm_weight=1.0), optimizer=optimizer)
    module.model = model(shape)
    module.head = OutputHead(module.model)
    trained(ours(module, data, steps, clocks[0], folder))
    batches = list(data.train_dataloader())
    del module
    trained(theirs(model(shape), batches, clocks[1], folder, optimizer.lr))
    seconds = [sum(clock.seconds[1:]) / len(clock.seconds[1:]) for clock in clocks]
    return [
        [what, clock.losses[-1], second, second / seconds[1], peak, peak / peaks[1]]
        for what, clock, second, peak in zip(
            ("fusechat, SFT", "transformers' Trainer"), clocks, seconds, peaks, strict=True
        )
    ]


HEADER = ["what", "loss of the last step", "CPU s a step", "of theirs", "peak MB above the weights", "of theirs"]


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = compared(SHAPE, STEPS, Path(folder))
    table("SFT, 134M parameters in fp32, 8 chats of 140 tokens, one thread", HEADER, rows)


if __name__ == "__main__":
    main()
