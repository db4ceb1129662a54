"""The loss computed chunk by chunk from a model's own output head."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from fusechat.app.errors import UserError
from fusechat.fusion.gradient import fused_loss
from fusechat.fusion.losses import FusionLoss
from fusechat.models.heads import OutputHead
from tests.fusion.dense import dense, example, in_float64

FAMILIES = {
    "llama": transformers.LlamaConfig,
    "qwen2-tied": transformers.Qwen2Config,
    "gpt_neox": transformers.GPTNeoXConfig,
    "mixtral": transformers.MixtralConfig,
    "gpt2": transformers.GPT2Config,
    "cohere": transformers.CohereConfig,
    "granite": transformers.GraniteConfig,
    "gemma2": transformers.Gemma2Config,
    "phi": transformers.PhiConfig,
}


def family(name: str) -> Any:
    options: dict[str, Any] = {
        "vocab_size": 90,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": name == "qwen2-tied",
    }
    if name in ("llama", "qwen2-tied", "mixtral", "cohere", "granite", "gemma2"):
        options["num_key_value_heads"] = 2
    options |= {"cohere": {"logit_scale": 0.25}, "granite": {"logits_scaling": 4.0}}.get(name, {})
    options |= {"gemma2": {"final_logit_softcapping": 5.0, "head_dim": 16}, "mixtral": {"num_local_experts": 2}}.get(
        name, {}
    )
    torch.manual_seed(1)
    config = FAMILIES[name](**options, experts_implementation="eager")  # the grouped kernel knows no fp64
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.double().eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_chunked_loss_equals_the_models_own_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusechat.fusion.slices.CHUNK_ELEMENTS", 90 * 4)  # several chunks
    model, loss = family(name), FusionLoss("forward_kl", "tail")
    ids = torch.randint(3, 90, (2, 9))
    _, logprobs, raw = example(18, 90, 5)
    logprobs = logprobs.double()
    targets = in_float64(replace(raw, p=loss.teacher(logprobs)))
    head = OutputHead(model)
    head.verify(ids)
    value, _ = fused_loss(head.hidden(ids).flatten(0, 1), head, targets, loss)
    value.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    sft = torch.nn.functional.cross_entropy(logits, targets.gold, reduction="none")
    wanted = (sft * targets.sft_weight + dense(logits, logprobs, targets, loss) * targets.fusion_weight).sum()
    wanted.backward()
    assert value.item() == pytest.approx(wanted.item(), abs=1e-9)
    for n, p in model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(ours[n], p.grad, atol=1e-9, rtol=0), n
    assert max(g.abs().max() for g in ours.values()) > 1e-3


def test_a_head_that_hides_something_is_refused() -> None:
    model = family("llama")
    forward = model.forward
    model.forward = lambda *a, **k: (out := forward(*a, **k)).__setitem__("logits", out.logits + 1) or out
    for remedy, told in (((), "do not show; take another model"), (("set x",), "do not show; set x")):
        with pytest.raises(UserError, match=told):
            OutputHead(model, *remedy).verify(torch.arange(5).unsqueeze(0))
