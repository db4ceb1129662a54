"""What weights are held in and what is computed in: fp32 master weights, unless adapters are trained over a pivot.

AdamW moves a weight by about the learning rate, 5e-6, a step; bf16 has 8 bits of mantissa, so that a weight of 0.02
moves in steps of 6e-5. Weights that are trained are kept in fp32 for that reason, and computation alone is in bf16.
"""

from __future__ import annotations

from fusechat.app.errors import UserError, one_of

PRECISIONS = {  # trainer.precision -> (what trained weights are held in, what is computed in)
    "32-true": ("float32", "float32"),
    "bf16-mixed": ("float32", "bfloat16"),
    "bf16-true": ("bfloat16", "bfloat16"),
    "64-true": ("float64", "float64"),
}
LOSS = ("refuse", "accept")
MEASURED = "300 steps at lr 5e-6 moved 7.7 % of the weights, and they moved 18 % of what fp32 moves them"


def weights_dtype(precision: str, pivot_dtype: str, *, lora: bool, precision_loss: str = "refuse") -> str:
    """The dtype that the model is loaded in. LoRA trains adapters in fp32 over a pivot of any dtype.

    Raises `UserError` for an unknown precision, and for full fine-tuning in bf16 unless ``precision_loss`` accepts it.
    """
    one_of(precision, tuple(PRECISIONS), "trainer.precision")
    one_of(precision_loss, LOSS, "precision_loss")
    if lora:
        return pivot_dtype
    if precision == "bf16-true" and precision_loss != "accept":
        raise UserError(
            f"trainer.precision=bf16-true keeps trained weights in bf16, which rounds updates away ({MEASURED}); VaRM "
            "would weigh the rounding; use trainer.precision=bf16-mixed, lora.enabled=true, or precision_loss=accept"
        )
    return PRECISIONS[precision][0]


def check_quantised(load_in: str | None, *, lora: bool, strategy: str) -> None:
    """Raises `UserError` where a quantised pivot would have to be trained itself, or be sharded."""
    if load_in is not None:
        one_of(load_in, ("8bit", "4bit"), "pivot.load_in")
        if not lora:
            raise UserError(f"pivot.load_in={load_in} trains nothing but adapters; add lora.enabled=true")
        if strategy == "fsdp":
            raise UserError(f"pivot.load_in={load_in}: fsdp shards no quantised weights; use trainer=ddp")
