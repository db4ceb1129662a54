"""FusionModule: a causal LM trained with L = lambda * L_SFT + (1 - lambda) * L_Fusion (FuseChat, arXiv 2402.16107)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import lightning
import torch
import transformers
from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.fusion.data import FusionBatch
from fusechat.fusion.gradient import Targets, fused_loss, loss_from_logits
from fusechat.fusion.losses import FusionLoss
from fusechat.fusion.rules import FusionRule, cross_entropy
from fusechat.models import load as models
from fusechat.models.heads import OutputHead
from fusechat.stores.units import bits_per_byte


@dataclass(frozen=True)
class Optimizer:
    """AdamW, published values. schedule: any name of `transformers.get_scheduler`; warmup_ratio: share of the steps."""

    lr: float = 5e-6
    betas: Sequence[float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    schedule: str = "cosine"


class FusionModule(lightning.LightningModule):
    """Wraps any `AutoModelForCausalLM`; hyperparameters are numbers, names and paths: checkpoints load safely.

    path: the pivot. source_names: the aligned sources in the order of the batches. lora: options of `peft.LoraConfig`.
    Raises `UserError` where nothing is left to fuse.
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
        self.path, self.gradient_checkpointing, self.lora = path, gradient_checkpointing, lora
        self.loading: dict[str, Any] = {"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
        self.loading |= {"attn_implementation": attn_implementation}
        settings = asdict(self.rule) | asdict(self.loss) | asdict(self.optimizer)
        settings |= {"schedule": self.loss.schedule, "lr_schedule": self.optimizer.schedule}
        settings |= {"path": path, "source_names": list(source_names), "lora": lora and dict(lora), **self.loading}
        self.save_hyperparameters(settings | {"gradient_checkpointing": gradient_checkpointing})
        self.source_names = list(source_names)
        sources = [f"{name} (source)" if name == "pivot" else name for name in source_names]
        self.names = ["pivot", *sources] if self.rule.include_pivot else sources
        self.model: Any = None
        self.head: OutputHead | None = None
        self.wins: Counter[tuple[str, str]] = Counter()
        self.validated_at = -1  # the optimizer step that the validation metrics are of

    def configure_model(self) -> None:
        """Loads the pivot once, in training mode (from_pretrained leaves dropout and gradient checkpointing off)."""
        if self.model is not None:
            return
        model: Any = models.load_model(self.path, **self.loading)
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if self.lora:
            import peft

            model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **self.lora))
            if self.gradient_checkpointing:
                model.enable_input_require_grads()
        if self.loss.chunked:
            self.head = OutputHead(model)
            probe = torch.arange(8).remainder(model.config.get_text_config().vocab_size).unsqueeze(0)
            self.head.verify(probe.to(self.head.projection.weight.device))
        self.model = model.train()

    def training_step(self, batch: FusionBatch) -> Tensor:
        """Loss of one micro-batch, scaled so that the step's gradient is that of its mean over all response tokens."""
        total, sft, fusion, part = self._losses(batch)
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size
        self._record(batch, part)
        count = max(1, len(batch.gold))
        for name, value in (("loss", total * batch.step_tokens), ("sft", sft), ("fusion", fusion)):
            mean, shown = value.detach() / float(count), name != "loss"
            self.log(f"train/{name}", mean, on_step=True, batch_size=len(batch.gold), prog_bar=shown)
        return total * scale

    def validation_step(self, batch: FusionBatch) -> None:
        """The same losses on held-out chats (of one's own: L_SFT alone), and bits per byte of the response text."""
        count, n_bytes = max(1, len(batch.gold)), batch.n_bytes[:, 0].sum()
        batch.step_tokens = batch.step_tokens.new_tensor(float(count))
        total, sft, fusion, _ = self._losses(batch)
        options: dict[str, Any] = {"sync_dist": True, "add_dataloader_idx": False}
        named = {"loss": total, "sft": sft / float(count), "fusion": fusion / float(count)}
        trainer: Any = self.trainer
        if trainer.datamodule.own is not None:  # no model has said anything of one's own chats
            del named["fusion"]
        for name, value in named.items():
            self.log(f"validation/{name}", value, batch_size=count, **options)
        bits = bits_per_byte(sft, n_bytes.clamp_min(1))
        self.log("validation/bits_per_byte", bits, batch_size=int(n_bytes), prog_bar=True, **options)

    def on_validation_end(self) -> None:
        """Notes which weights were validated."""
        self.validated_at = self.global_step

    def targets(self, batch: FusionBatch) -> tuple[Targets, Tensor]:
        """What the rule makes of the batch's distributions; and each model's part in every position, [N, S]."""
        first = 0 if self.rule.include_pivot else 1
        p, ids = self.loss.teacher(batch.logprobs), batch.ids.long()
        own, common = (batch.nats, batch.n_tokens), (batch.common_nats, batch.common_bytes)
        ce = cross_entropy(*(common if self.rule.metric == "bits_per_byte" else own))[:, first:]
        fused = self.rule(ids[first:], p[first:], batch.gold_logprob[first:], ce, batch.sequence, (ids[0], p[0]))
        progress = self.global_step / max(1, self._total_steps())
        has_target = (fused.p > 0).any(-1)  # where there is nothing to fuse, lambda is 1
        lam = self.loss.sft_share(progress, fused.reward)[batch.sequence].masked_fill(~has_target, 1.0)
        per_token = 1.0 / batch.step_tokens.clamp_min(1)
        targets = Targets(fused.ids, fused.p, batch.gold, lam * per_token, (1 - lam) * per_token)
        return targets, fused.weight

    def _losses(self, batch: FusionBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weighted loss, sums of sft and divergence over the positions, each model's part [N, S]."""
        targets, part = self.targets(batch)
        if len(batch.gold) == 0:  # nothing to learn from: keeps the graph, adds zero
            nothing = targets.p.new_zeros(())
            total = sum((p.sum() * 0.0 for p in self.parameters() if p.requires_grad), nothing)
            return total, nothing, nothing, part
        if self.head is not None:
            hidden = self.head.hidden(batch.input_ids, batch.attention_mask).flatten(0, 1)[batch.at]
            total, each = fused_loss(hidden, self.head, targets, self.loss)
        else:
            logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            total, each = loss_from_logits(logits.flatten(0, 1)[batch.at], targets, self.loss)
        return total, each[0].sum(), each[1][targets.fusion_weight > 0].sum(), part

    def configure_optimizers(self) -> Any:
        """AdamW and a schedule of transformers with warm-up."""
        chosen, steps = self.optimizer, self._total_steps()
        trained = [p for p in self.parameters() if p.requires_grad]
        betas = (chosen.betas[0], chosen.betas[1])
        optimizer = torch.optim.AdamW(trained, lr=chosen.lr, betas=betas, weight_decay=chosen.weight_decay)
        warmup = int(chosen.warmup_ratio * steps)
        schedule = transformers.get_scheduler(
            chosen.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def win_rates(self) -> dict[str, dict[str, float]]:
        """Tag -> model -> its share of the response tokens it spoke for; ``all`` sums the tags."""
        tags = sorted({tag for tag, _ in self.wins})
        totals = {tag: sum(self.wins[tag, name] for name in self.names) or 1 for tag in tags}
        return {tag: {name: self.wins[tag, name] / totals[tag] for name in self.names} for tag in tags}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the counts and the state of the random generators, for a resume that continues bit for bit."""
        checkpoint["wins"] = [[tag, name, count] for (tag, name), count in self.wins.items()]
        checkpoint["rng"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The inverse of `on_save_checkpoint`."""
        self.wins = Counter({(tag, name): count for tag, name, count in checkpoint["wins"]})
        torch.set_rng_state(checkpoint["rng"])

    def _record(self, batch: FusionBatch, part: Tensor) -> None:
        """Counts, per tag, how many response tokens each model spoke for."""
        per_chat = part.new_zeros(len(batch.tags), part.shape[1]).index_add_(0, batch.sequence, part).tolist()
        for tag, shares in zip(batch.tags, per_chat, strict=True):
            for name, share in zip(self.names, shares, strict=True):
                self.wins["all", name] += share  # type: ignore[assignment]
                if tag:
                    self.wins[tag, name] += share  # type: ignore[assignment]

    def _total_steps(self) -> int:
        return max(1, int(self.trainer.estimated_stepping_batches)) if self._trainer is not None else 1
