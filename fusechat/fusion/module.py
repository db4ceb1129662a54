"""FusionModule: a causal LM trained with L = lambda * L_SFT + (1 - lambda) * L_Fusion (FuseChat, arXiv 2402.16107)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import lightning
import torch
import transformers
from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.fusion.data import FusionBatch
from fusechat.fusion.losses import FusionLoss, Targets, fused_loss, loss_from_logits, schedule_weight
from fusechat.fusion.rules import FusionRule, cross_entropy
from fusechat.models import load as models
from fusechat.models.heads import OutputHead

SCHEDULES = ("hard", "hard_and_decay", "soft")


class FusionModule(lightning.LightningModule):
    """Wraps any `AutoModelForCausalLM`; every argument is a number, a name or a path, so that checkpoints load safely.

    source_names: the aligned sources in the order of the batches. include_pivot: the pivot's own distribution takes part.
    lm_weight: lambda; 1 is plain SFT and needs no distributions. Raises `UserError` for values out of range.
    """

    def __init__(
        self,
        path: str,
        source_names: Sequence[str],
        *,
        dtype: str = "float32",
        revision: str | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        lora: dict[str, Any] | None = None,
        rule: str = "min_ce",
        level: str = "sequence",
        metric: str = "bits_per_byte",
        empty: str = "skip",
        include_pivot: bool = True,
        lm_weight: float = 0.9,
        schedule: str = "hard",
        kind: str = "ce",
        temperature: float = 1.0,
        student_temperature: float = 1.0,
        missing_mass: str = "renormalize",
        chunked: bool = True,
        lr: float = 5e-6,
        betas: Sequence[float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.03,
        lr_schedule: str = "cosine",
    ) -> None:
        super().__init__()
        if not 0 <= lm_weight <= 1:
            raise UserError(f"loss.lm_weight={lm_weight} is outside [0, 1]; 1 is plain SFT, 0 fusion alone")
        if schedule not in SCHEDULES:
            raise UserError(f"loss.schedule={schedule!r} is unknown; use one of: {', '.join(SCHEDULES)}")
        if lm_weight < 1 and not source_names and not include_pivot:
            raise UserError("no source takes part in the fusion; name one with source=NAME, or set fusion=sft")
        self.save_hyperparameters()
        self.rule, self.loss = (
            FusionRule(rule, level, metric, empty),
            FusionLoss(kind, missing_mass, temperature, student_temperature),
        )
        sources = [f"{name} (source)" if name == "pivot" else name for name in source_names]
        self.names = ["pivot", *sources] if include_pivot else sources
        self.model: Any = None
        self.head: OutputHead | None = None
        self.wins: Counter[tuple[str, str]] = Counter()
        self.validated_at = -1  # the optimizer step that the validation metrics are of

    def configure_model(self) -> None:
        """Loads the pivot once, in training mode (from_pretrained leaves dropout and gradient checkpointing off)."""
        if self.model is not None:
            return
        hp: Any = self.hparams
        model: Any = models.load_model(
            hp.path,
            dtype=hp.dtype,
            revision=hp.revision,
            trust_remote_code=hp.trust_remote_code,
            attn_implementation=hp.attn_implementation,
        )
        if hp.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if hp.lora:
            import peft

            model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **hp.lora))
            if hp.gradient_checkpointing:
                model.enable_input_require_grads()
        if hp.chunked:
            head = OutputHead(model)
            head.verify(
                torch.arange(8)
                .remainder(model.config.get_text_config().vocab_size)
                .unsqueeze(0)
                .to(head.head.weight.device)
            )
            self.head = head
        self.model = model.train()

    def training_step(self, batch: FusionBatch) -> Tensor:
        """Loss of one micro-batch, scaled so that the step's gradient is that of its mean over all response tokens."""
        total, sft, fusion, part = self._losses(batch)
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size
        self._record(batch, part)
        count = float(max(1, len(batch.gold)))
        for name, value in (("loss", total * batch.step_tokens), ("sft", sft), ("fusion", fusion)):
            self.log(
                f"train/{name}",
                value.detach() / count,
                on_step=True,
                batch_size=len(batch.gold),
                prog_bar=name != "loss",
            )
        return total * scale

    def validation_step(self, batch: FusionBatch) -> None:
        """The same losses on held-out chats, and bits per byte of the response text."""
        batch.step_tokens = batch.step_tokens.new_tensor(float(max(1, len(batch.gold))))
        total, sft, fusion, _ = self._losses(batch)
        count, n_bytes = batch.step_tokens, batch.n_bytes[:, 0].sum()
        for name, value in (("loss", total), ("sft", sft / count), ("fusion", fusion / count)):
            self.log(f"validation/{name}", value, batch_size=int(count), sync_dist=True, add_dataloader_idx=False)
        bits = sft / n_bytes.clamp_min(1) / torch.log(torch.tensor(2.0))
        self.log(
            "validation/bits_per_byte",
            bits,
            batch_size=int(n_bytes),
            sync_dist=True,
            prog_bar=True,
            add_dataloader_idx=False,
        )

    def on_validation_end(self) -> None:
        """Notes which weights were validated."""
        self.validated_at = self.global_step

    def targets(self, batch: FusionBatch) -> tuple[Targets, Tensor]:
        """What the rule makes of the batch's distributions; and each model's part in every position, [N, S]."""
        hp: Any = self.hparams
        first = 0 if hp.include_pivot else 1
        p = self.loss.teacher(batch.logprobs)
        ce = cross_entropy(batch.nats, batch.n_bytes, batch.n_tokens, self.rule.metric)[:, first:]
        ids = batch.ids.long()
        fused = self.rule(ids[first:], p[first:], batch.gold_logprob[first:], ce, batch.sequence, (ids[0], p[0]))
        progress = self.global_step / max(1, self._total_steps())
        weight = schedule_weight(hp.schedule, hp.lm_weight, progress, fused.reward)[batch.sequence]
        has_target = (fused.p > 0).any(-1) if self.loss.kind != "uld" else (fused.p.sum(-1) > 0)
        per_token = 1.0 / batch.step_tokens.clamp_min(1)
        return Targets(
            fused.ids, fused.p, batch.gold, weight * per_token, (1 - weight) * has_target * per_token
        ), fused.weight

    def _losses(self, batch: FusionBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weighted loss, sums of sft and divergence over the positions, each model's part [N, S]."""
        targets, part = self.targets(batch)
        if len(batch.gold) == 0:  # nothing to learn from: keeps the graph, adds zero
            return (
                sum(p.sum() * 0.0 for p in self.parameters() if p.requires_grad),
                *[targets.p.new_zeros(())] * 2,
                part,
            )  # type: ignore[return-value]
        if self.head is not None:
            hidden = self.head.hidden(batch.input_ids, batch.attention_mask).flatten(0, 1)[batch.at]
            total, each = fused_loss(hidden, self.head, targets, self.loss)
        else:
            logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            total, each = loss_from_logits(logits.flatten(0, 1)[batch.at], targets, self.loss)
        return total, each[0].sum(), each[1][targets.fusion_weight > 0].sum(), part

    def configure_optimizers(self) -> Any:
        """AdamW and a schedule of transformers with warm-up."""
        hp: Any = self.hparams
        steps = self._total_steps()
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=hp.lr, betas=tuple(hp.betas), weight_decay=hp.weight_decay)
        warmup = int(hp.warmup_ratio * steps)
        schedule = transformers.get_scheduler(
            hp.lr_schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps
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
