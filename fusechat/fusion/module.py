"""FusionModule: a causal LM trained with L = lambda * L_SFT + (1 - lambda) * L_Fusion (FuseChat, arXiv 2402.16107)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import lightning
import torch
from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.chats.padding import flattened, packed
from fusechat.fusion.adapters import with_adapters
from fusechat.fusion.batches import FusionBatch
from fusechat.fusion.failures import skip_step
from fusechat.fusion.gradient import fused_loss, loss_from_logits
from fusechat.fusion.losses import FusionLoss
from fusechat.fusion.optimizers import make_optimizer, make_schedule
from fusechat.fusion.options import Optimizer
from fusechat.fusion.packing import check_apart
from fusechat.fusion.ranks import gathered, generators, set_generators
from fusechat.fusion.rules import FusionRule
from fusechat.fusion.sharding import first_loads, shard, within
from fusechat.fusion.targets import Targets, targets_of
from fusechat.fusion.wins import Wins
from fusechat.models import load as models
from fusechat.models.heads import OutputHead, Within
from fusechat.stores.units import bits_per_byte


class FusionModule(lightning.LightningModule):
    """Wraps any `AutoModelForCausalLM`; hyperparameters are numbers, names and paths: checkpoints load safely.

    path: the pivot. source_names: the aligned sources in the order of the batches. lora: options of `peft.LoraConfig`.
    dtype: what weights are held in; compute: what shards are gathered in where the trainer's strategy shards. Raises
    `UserError` where nothing is left to fuse.
    """

    def __init__(
        self,
        path: str,
        source_names: Sequence[str],
        *,
        rule: FusionRule | None = None,
        loss: FusionLoss | None = None,
        optimizer: Optimizer | None = None,
        dtype: str = "float32",
        compute: str = "float32",
        load_in: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        lora: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.rule, self.loss, self.optimizer = rule or FusionRule(), loss or FusionLoss(), optimizer or Optimizer()
        if not self.rule.needs_sources:  # plain SFT: lambda is 1
            self.loss = replace(self.loss, lm_weight=1.0, schedule="hard")
            self.rule = replace(self.rule, include_pivot=True)
        if self.loss.lm_weight < 1 and not source_names and not self.rule.include_pivot:
            raise UserError("no source takes part in the fusion; name one with source=NAME, or set fusion=sft")
        self.path, self.compute, self.gradient_checkpointing, self.lora = path, compute, gradient_checkpointing, lora
        self.loading: dict[str, Any] = {"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
        self.loading |= {"attn_implementation": attn_implementation, "load_in": load_in}
        settings = asdict(self.rule) | asdict(self.loss) | self.optimizer.settings
        settings |= {"schedule": self.loss.schedule, "lr_schedule": self.optimizer.schedule}
        settings |= {"path": path, "source_names": list(source_names), "lora": lora and dict(lora), **self.loading}
        settings |= {"gradient_checkpointing": gradient_checkpointing}
        self.save_hyperparameters(settings, logger=False)  # loggers have them under the config's names
        self.source_names = list(source_names)
        sources = [f"{name} (source)" if name == "pivot" else name for name in source_names]
        self.names = ["pivot", *sources] if self.rule.include_pivot else sources
        self.model: Any = None
        self.head: OutputHead | None = None
        self.wins = Wins(self.names, pivot_else=self.rule.takes_one and self.rule.include_pivot)
        self.sums: Tensor | None = None  # of this rank's micro-batches of a step: loss, sft, fusion, tokens
        self.held_out = torch.zeros(5)  # of this rank's part of a validation: loss, sft, fusion, tokens, bytes
        self.tokens = 0  # of this run, over all ranks; a tensor once there are some
        self.generators: list[dict[str, Tensor]] | None = None  # states to resume with, rank by rank
        self.skipped = 0  # steps in a row whose loss was not finite
        self.validated_at = -1  # the optimizer step that the validation metrics are of

    @property
    def data(self) -> Any:
        """The training's `fusechat.fusion.data.FusionDataModule`."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Loads the pivot once, in training mode (from_pretrained leaves dropout and gradient checkpointing off)."""
        if self.model is not None:
            return
        sharded = self._device_mesh is not None
        model: Any = first_loads(self._load, self._empty) if sharded else self._load()
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if self.lora:
            model = with_adapters(model, self.lora)
            if self.gradient_checkpointing:
                model.enable_input_require_grads()
        if self.loss.chunked:
            self.head = OutputHead(
                model, "set loss.chunked=false (FusionLoss(chunked=False)): the model's own logits serve"
            )
        self.model = model.train()
        if self._device_mesh is not None:
            device = self.trainer.strategy.root_device
            shard(model, self._device_mesh["data_parallel"], getattr(torch, self.compute), device)

    def _load(self) -> Any:
        return models.load_model(self.path, **self.loading)

    def _empty(self) -> Any:
        return models.empty_model(self.path, **{key: of for key, of in self.loading.items() if key != "load_in"})

    def on_fit_start(self) -> None:
        """On the device, in the precision and the shards of the training: does the head give the model's logits, and
        are chats that share a row read as if they were alone?
        """
        as_forward: Within = lambda work: within(self.model, work)
        lay = self.data.rows.lay
        with self.trainer.precision_plugin.forward_context():
            if self.head is not None:
                probe = torch.arange(8, device=self.device).remainder(self.head.vocabulary).unsqueeze(0)
                self.head.verify(probe, as_forward)
            if lay is flattened:  # flash attention knows no other precision
                check_apart(self.model, lay, self.device, as_forward)
        if lay is packed:  # as exactly as weights allow: a weak leak is below the rounding of autocast
            check_apart(self.model, lay, self.device, as_forward)

    def on_train_start(self) -> None:
        """Every rank draws for itself (dropout), or goes on where it stopped."""
        rank, states = self.global_rank, self.generators
        if states is not None and len(states) == self.trainer.world_size:
            set_generators(states[rank])
        elif rank or states is not None:
            torch.manual_seed(torch.initial_seed() + rank + self.trainer.world_size * self.global_step)

    def training_step(self, batch: FusionBatch) -> Tensor:
        """Loss of one micro-batch, scaled so that the step's gradient is that of its mean over all response tokens."""
        total, sft, fusion, part = self._losses(batch)
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size
        self.wins.add(batch, part)
        sums = torch.stack([total.detach(), sft, fusion, batch.attention_mask.sum().to(total)])
        self.step_tokens, self.sums = batch.step_tokens, sums if self.sums is None else self.sums + sums
        return total * scale

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Logs the step's loss and its parts, means over the response tokens of all micro-batches and ranks."""
        assert self.sums is not None
        loss, sft, fusion, tokens = self.trainer.strategy.reduce(self.sums, reduce_op="sum")
        self.sums, self.tokens = None, self.tokens + tokens
        self.skipped = 0 if bool(torch.isfinite(loss)) else skip_step(self, loss, self.skipped)
        for name, value in (("loss", loss), ("sft", sft / self.step_tokens), ("fusion", fusion / self.step_tokens)):
            self.log(f"train/{name}", value, on_step=True, batch_size=1, prog_bar=name != "loss")

    def optimizer_step(self, *given: Any, **named: Any) -> None:
        """A step, after which its gradients go: Lightning would hold them until the next forward pass is over."""
        super().optimizer_step(*given, **named)
        self.zero_grad()

    def on_validation_epoch_start(self) -> None:
        """Nothing is summed yet."""
        self.held_out = torch.zeros(5, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: FusionBatch) -> None:
        """Sums the same losses over held-out chats, or of one's own: L_SFT alone."""
        batch.step_tokens = torch.ones_like(batch.step_tokens)
        total, sft, fusion, _ = self._losses(batch)
        counts = sft.new_tensor(len(batch.gold)), batch.n_bytes[:, 0].sum()
        self.held_out += torch.stack([total, sft, fusion, *counts])

    def on_validation_epoch_end(self) -> None:
        """Logs their means over all ranks' response tokens, and bits per byte of the response text."""
        loss, sft, fusion, tokens, n_bytes = self.trainer.strategy.reduce(self.held_out, reduce_op="sum")
        named = {"loss": loss, "sft": sft, "fusion": fusion}
        if self.data.own is not None:  # no model has said anything of one's own chats
            del named["fusion"]
        for name, value in named.items():
            self.log(f"validation/{name}", (value / tokens.clamp_min(1)).float(), batch_size=1)
        bits = bits_per_byte(sft, n_bytes.clamp_min(1)).float()
        self.log("validation/bits_per_byte", bits, batch_size=1, prog_bar=True)

    def on_validation_end(self) -> None:
        """Notes which weights were validated."""
        self.validated_at = self.global_step

    def targets(self, batch: FusionBatch) -> tuple[Targets, Tensor]:
        """What the batch is trained on at this step; and each model's part in every position, [N, S]."""
        return targets_of(batch, self.rule, self.loss, self.global_step / max(1, self.total_steps()))

    def _losses(self, batch: FusionBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weighted loss, sums of sft and divergence over the positions, each model's part [N, S]."""
        targets, part = self.targets(batch)
        total, each = within(self.model, lambda: self._student(batch, targets))
        return total, each[0].sum(), each[1][targets.fusion_weight > 0].sum(), part

    def _student(self, batch: FusionBatch, targets: Targets) -> tuple[Tensor, Tensor]:
        """The weighted loss, and sft and divergence of each position [2, N]."""
        if self.head is not None:
            hidden = self.head.hidden(**batch.read).flatten(0, 1)[batch.at]
            return fused_loss(hidden, self.head, targets, self.loss)
        logits = self.model(**batch.read, use_cache=False).logits
        return loss_from_logits(logits.flatten(0, 1)[batch.at], targets, self.loss)

    def configure_optimizers(self) -> Any:
        """The optimizer, and its schedule over the steps of the training."""
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        optimizer = make_optimizer(self.optimizer, trained)
        schedule = make_schedule(self.optimizer, optimizer, self.total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the counts and every rank's random generators, for a resume that continues bit for bit."""
        checkpoint["wins"] = self.wins.state()
        checkpoint["rng"] = gathered(generators(self.device))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The inverse of `on_save_checkpoint`; the epoch's progress is told in micro-batches of today's size."""
        self.wins.restore(checkpoint["wins"] if self.global_rank == 0 else [])
        self.generators = checkpoint["rng"]
        loop = checkpoint["loops"]["fit_loop"]
        done = self.data.train_plan().micro_batches(loop["state_dict"]["combined_loader"][0]["steps"])
        progress = loop["epoch_loop.batch_progress"]["current"]
        behind = progress["ready"] - progress["completed"]  # 1 where it was saved before its batch had quite ended
        progress |= dict.fromkeys(progress, done) | {"completed": done - behind}

    def total_steps(self) -> int:
        """Optimizer steps of the training; asking Lightning would begin an epoch before a resume can tell where."""
        if self._trainer is None:
            return 1
        epochs, steps = self.trainer.max_epochs, self.trainer.max_steps
        ends = [steps] if steps >= 0 else []
        ends += [epochs * self.data.train_plan().optimizer_steps] if epochs is not None and epochs >= 0 else []
        return max(1, min(ends, default=1))
