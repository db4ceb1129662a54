"""The sparse loss: the published trainers' 44 cases, a naive dense reference for every option, and every head we know."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.app.registry import choices
from fusechat.fusion.checks import check_rule
from fusechat.fusion.gradient import Targets, fused_loss, loss_from_logits
from fusechat.fusion.losses import LOSSES, MISSING, FusionLoss
from fusechat.fusion.rules import RULES, FusionRule
from fusechat.models.heads import OutputHead
from tests.conftest import GOLDEN

MANIFEST = json.loads((GOLDEN / "loss" / "manifest.json").read_text())
INPUTS, OUTPUTS = np.load(GOLDEN / "loss" / "inputs.npz"), np.load(GOLDEN / "loss" / "outputs.npz")


def padded(name: str, rows: list[int]) -> tuple[Tensor, Tensor]:
    logits, ids, offsets = (INPUTS[f"{name}_{part}"] for part in ("logits", "ids", "offsets"))
    width = max(offsets[r + 1] - offsets[r] for r in range(len(offsets) - 1))
    out, out_ids = torch.full((len(rows), width), -torch.inf), torch.zeros(len(rows), width, dtype=torch.long)
    for n, r in enumerate(rows):
        part = slice(offsets[r], offsets[r + 1])
        out[n, : part.stop - part.start] = torch.tensor(logits[part])
        out_ids[n, : part.stop - part.start] = torch.tensor(ids[part].astype(np.int64))
    return out_ids, out


@pytest.mark.parametrize("case", MANIFEST["cases"], ids=lambda c: c["name"])
def test_parity_with_the_published_trainers(case: dict[str, Any]) -> None:
    student, plain_text = torch.tensor(INPUTS["student_logits"]), case["version"].startswith("FuseLLM")
    starts = np.concatenate([[0], np.cumsum(INPUTS["seq_lens"])])
    places = []  # (sequence, batch row, t, is a label, is fused)
    for sequence, b in enumerate(case["batch"]):
        for t in range(student.shape[1]):
            label = INPUTS["labels"][b, t + 1] if t + 1 < student.shape[1] else -100
            fused = bool(INPUTS["attention_mask"][b, t]) if plain_text else label != -100
            if fused or label != -100:
                places.append((sequence, b, t, label, fused))
    sequence, rows_b, rows_t, labels, fused = (list(column) for column in zip(*places, strict=True))
    sources = ["src0", "src1"][: case.get("n_sources", 1)]
    names = (["pivot"] if case["with_ref"] else []) + sources
    ce = torch.tensor(np.stack([INPUTS[f"metric_ce_{'base' if n == 'pivot' else n}"][case["batch"]] for n in names], 1))
    if "metric_base" in case:
        ce = torch.tensor([case["metric_base"], case["metric_fused"]]).T
    loss = FusionLoss({"ce": "ce", "kl": "forward_kl"}[case["loss_type"]], temperature=case.get("temperature", 1.0))
    rule = FusionRule(
        rule={"greater": "min_ce", "weighted": "avg_ce"}[case.get("mode", "greater")],
        metric="nats_per_token",
        empty="pivot",
    )
    rows = [int(starts[b] + t) for b, t in zip(rows_b, rows_t, strict=True)]
    data = {name: padded(name, rows) for name in {*names, "pivot"}}
    width = max(ids.shape[1] for ids, _ in data.values())
    widen = lambda x: torch.nn.functional.pad(x, (0, width - x.shape[1]))
    pivot = (widen(data["pivot"][0]), widen(loss.teacher(data["pivot"][1])))
    each = []
    for name in names:  # as released, a model that is silent at a position speaks with the pivot's row
        ids, p = widen(data[name][0]), widen(loss.teacher(data[name][1]))
        silent = ~(p > 0).any(-1, keepdim=True)
        each.append((torch.where(silent, pivot[0], ids), torch.where(silent, pivot[1], p)))
    at = torch.tensor(sequence)
    result = rule(
        torch.stack([i for i, _ in each]),
        torch.stack([p for _, p in each]),
        torch.zeros(len(names), len(rows)),
        ce.float(),
        at,
        pivot,
    )
    progress = case.get("global_step", 0) / case.get("max_steps", 1)
    schedule = {"lm_weight": case["lm_loss_weight"], "schedule": case.get("type", "hard")}
    weight = replace(loss, **schedule).sft_share(progress, result.reward)[at]
    is_label, is_fused = (
        torch.tensor([float(label != -100) for label in labels]),
        torch.tensor([float(f) for f in fused]),
    )
    gold = torch.tensor([max(0, int(label)) for label in labels])
    targets = Targets(
        result.ids, result.p, gold, weight * is_label / is_label.sum(), (1 - weight) * is_fused / is_fused.sum()
    )
    leaf = student.clone().requires_grad_()
    value, _ = loss_from_logits(leaf[rows_b, rows_t].clone(), targets, loss)
    value.backward()
    wanted = torch.tensor(OUTPUTS[f"{case['name']}.grad"])
    gradient = leaf.grad if wanted.shape == leaf.shape else leaf.grad[case["batch"]]
    assert abs(value.item() - case["loss"]) < 1e-6
    assert (gradient - wanted).abs().max() < 1e-7


def dense(logits: Tensor, logprobs: Tensor, targets: Targets, loss: FusionLoss) -> Tensor:
    """The textbook, over the whole vocabulary: to be checked by eye."""
    n, v = logits.shape
    log_q = (logits / loss.student_temperature).log_softmax(-1)
    q, p = log_q.exp(), logits.new_zeros(n, v).scatter(1, targets.ids, loss.teacher(logprobs))
    kept = torch.zeros(n, v, dtype=torch.bool).scatter(1, targets.ids, logprobs > -torch.inf)
    if loss.kind == "uld":
        top = q.sort(-1, descending=True).values[:, : targets.ids.shape[1]]
        each = (targets.p - top).abs().sum(-1)
        return each + ((1 - targets.p.sum(-1)) - (1 - top.sum(-1))).abs() if loss.missing_mass == "tail" else each
    if loss.kind == "standardized_uld":
        ours = [row.topk(int(many.sum())).values for row, many in zip(logits, logprobs > -torch.inf, strict=True)]
        theirs = [row[row > -torch.inf].sort(descending=True).values for row in logprobs]
        pairs = zip(ours, theirs, strict=True)
        shapes = [((x - x.mean()) / x.std(correction=0), (y - y.mean()) / y.std(correction=0)) for x, y in pairs]
        return torch.stack([(x - y).abs().sum() for x, y in shapes])
    rest = loss.missing_mass == "tail" or (loss.kind == "jsd" and loss.missing_mass == "renormalize")
    p_all, q_all = torch.where(kept, p, 0.0), torch.where(kept, q, 0.0)
    if loss.kind == "reverse_kl" and loss.missing_mass == "renormalize":
        q_all = q_all / q_all.sum(-1, keepdim=True)
    if rest:
        p_tail = (1 - p.sum(-1, keepdim=True)).clamp_min(0) if loss.missing_mass == "tail" else logits.new_zeros(n, 1)
        p_all, q_all = torch.cat([p_all, p_tail], 1), torch.cat([q_all, 1 - q_all.sum(-1, keepdim=True)], 1)
    xlogy = torch.special.xlogy
    if loss.kind == "ce":
        return -xlogy(p_all, torch.where(p_all > 0, q_all, 1.0)).sum(-1)
    if loss.kind in ("forward_kl", "hybrid"):  # all tokens are common: the whole divergence is by id
        return (xlogy(p_all, p_all) - xlogy(p_all, torch.where(p_all > 0, q_all, 1.0))).sum(-1)
    if loss.kind == "reverse_kl":
        return xlogy(q_all, torch.where(q_all > 0, q_all / torch.where(q_all > 0, p_all, 1.0), 1.0)).sum(-1)
    mean = (p_all + q_all) / 2
    safe = torch.where(mean > 0, mean, 1.0)
    return (xlogy(p_all, p_all) - xlogy(p_all, safe) + xlogy(q_all, q_all) - xlogy(q_all, safe)).sum(-1) / 2


def example(n: int, v: int, k: int) -> tuple[Tensor, Tensor, Targets]:
    """Random logits, stored log-probabilities (ragged: one row lacks an entry) and targets without p."""
    torch.manual_seed(0)
    teacher = torch.randn(n, v).mul(2).log_softmax(-1)
    values, ids = teacher.topk(k)
    values[0, -1] = -torch.inf
    weights = torch.rand(2, n) / n
    return torch.randn(n, v), values, Targets(ids, values, torch.randint(0, v, (n,)), weights[0], weights[1])


def in_float64(targets: Targets) -> Targets:
    return Targets(
        *(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in vars(targets).values())
    )


OF_TOKENS = sorted(name for name, member in LOSSES.items() if "chunks" not in member.needs)


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (2.0, 1.5)])
@pytest.mark.parametrize(("kind", "missing"), itertools.product(OF_TOKENS, MISSING))
def test_loss_and_gradient_equal_the_dense_reference(
    kind: str, missing: str, temperatures: tuple[float, float]
) -> None:
    loss = FusionLoss(kind, missing, *temperatures)
    logits, logprobs, raw = example(40, 60, 6)
    logits, logprobs = logits.double(), logprobs.double()
    targets = in_float64(replace(raw, p=loss.teacher(logprobs)))
    leaf = logits.clone().requires_grad_()
    sft = torch.nn.functional.cross_entropy(leaf, targets.gold, reduction="none")
    wanted = (sft * targets.sft_weight + dense(leaf, logprobs, targets, loss) * targets.fusion_weight).sum()
    wanted.backward()
    ours = logits.clone().requires_grad_()
    value, each = loss_from_logits(ours * 1.0, targets, loss)
    value.backward()
    assert value.item() == pytest.approx(wanted.item(), abs=1e-12)
    assert torch.allclose(each[0], sft, atol=1e-12)
    assert (ours.grad - leaf.grad).abs().max() < 1e-12
    assert leaf.grad.abs().max() > 1e-3
    with torch.no_grad():
        assert loss_from_logits(logits.clone(), targets, loss)[0] == value
    in_fp32, _ = loss_from_logits(logits.float(), replace(raw, p=loss.teacher(logprobs).float()), loss)
    assert in_fp32.dtype == torch.float32
    assert in_fp32.item() == pytest.approx(wanted.item(), abs=1e-4)


def chunked_example(n: int, v: int, temperature: float) -> tuple[Tensor, Targets, list[range], list[float]]:
    """Logits and chunks of 1 to 4 positions, one of which has no source; the chunks with the source's nats."""
    torch.manual_seed(1)
    sizes = [1, 3, 1, 2, 4]
    starts = np.cumsum([0, *itertools.islice(itertools.cycle(sizes), n)])
    spans = [range(a, min(b, n)) for a, b in itertools.pairwise(starts.tolist()) if a < n]
    nats, gold = (torch.rand(len(spans)) * 4 + 0.1).tolist(), torch.randint(0, v, (n,))
    chunk, p, weight = torch.empty(n, dtype=torch.long), torch.empty(n, 1), torch.zeros(n)
    for number, (span, spent) in enumerate(zip(spans, nats, strict=True)):
        chunk[span.start : span.stop], p[span.start : span.stop] = 3 * number, float(np.exp(-spent / temperature))
        weight[span.stop - 1] = 0.0 if number == 2 else 0.3
    return torch.randn(n, v), Targets(gold.unsqueeze(1), p, gold, torch.rand(n) / n, weight, chunk), spans, nats


def naive_alm(logits: Tensor, targets: Targets, spans: list[range], nats: list[float], temperature: float) -> Tensor:
    """As published, chunk by chunk."""
    log_q, total = logits.log_softmax(-1), logits.new_zeros(())
    for span, spent in zip(spans, nats, strict=True):
        a = torch.tensor(-spent / temperature - 1e-6, dtype=logits.dtype)
        b = sum(log_q[n, targets.gold[n]] for n in span) / temperature - 1e-6
        bce = -(a.exp() * b + (1 - a.exp()) * torch.log(1 - torch.exp(b)))
        total = total + targets.fusion_weight[span.stop - 1] * bce
    return total - (log_q[torch.arange(len(logits)), targets.gold] * targets.sft_weight).sum()


@pytest.mark.parametrize("temperature", [1.0, 5.0])
@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_chunk_likelihood_equals_the_published_formula(
    temperature: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few rows of logits are held at a time: chunks are never torn; from logits and from hidden states."""
    monkeypatch.setattr("fusechat.fusion.slices.chunk_rows", lambda *_: rows)
    loss = FusionLoss("alm", temperature=temperature)
    logits, raw, spans, nats = chunked_example(23, 11, temperature)
    leaf, targets = logits.double().requires_grad_(), in_float64(raw)
    exact = torch.tensor([-spent / temperature for spent in nats], dtype=torch.float64).exp()
    targets = replace(targets, p=exact[targets.chunk // 3].unsqueeze(1))
    wanted = naive_alm(leaf, targets, spans, nats, temperature)
    (gradient,) = torch.autograd.grad(wanted, leaf)
    ours = logits.double().requires_grad_()
    value, each = loss_from_logits(ours * 1.0, targets, loss)
    value.backward()
    assert value.item() == pytest.approx(wanted.item(), abs=1e-11)
    assert (ours.grad - gradient).abs().max() < 1e-11 < gradient.abs().max()
    assert each.shape == (2, 23)
    head = torch.nn.Linear(7, 11, bias=False).double()
    hidden = torch.randn(23, 7, dtype=torch.float64, requires_grad=True)
    stub = SimpleNamespace(projection=head, transform=lambda z: z, softcap=None, scale=1.0)
    value, _ = fused_loss(hidden, stub, targets, loss)
    found = torch.autograd.grad(value, [hidden, head.weight])
    reference = torch.autograd.grad(naive_alm(head(hidden), targets, spans, nats, temperature), [hidden, head.weight])
    assert all((a - b).abs().max() < 1e-11 for a, b in zip(found, reference, strict=True))


def test_chunk_likelihood_passes_gradcheck() -> None:
    loss, p = FusionLoss("alm", temperature=2.0), torch.rand(9, 1, dtype=torch.float64)
    log_q = (torch.rand(9, 1, dtype=torch.float64) * -5 - 0.01).requires_grad_()  # either branch of log(1 - q)
    assert torch.autograd.gradcheck(lambda x: loss.divergence(p, x), (log_q,))


def test_chunk_likelihood_is_least_where_the_student_agrees() -> None:
    loss, p = FusionLoss("alm"), torch.tensor([[0.25], [1.0], [1e-30], [0.0]])
    log_q = torch.tensor([0.25, 1.0, 1e-30, 1e-30]).log().unsqueeze(1).requires_grad_()
    divergence = loss.divergence(p, log_q)
    (slope,) = torch.autograd.grad(divergence.sum(), log_q)
    assert divergence.isfinite().all() and slope.isfinite().all()
    assert slope[0].abs() < 1e-5 < (loss.divergence(p, torch.tensor([[0.5]]).log())[0] - divergence[0]).abs()


def test_chunk_likelihood_has_one_temperature() -> None:
    with pytest.raises(
        UserError, match=r"student_temperature=2.0: loss.kind=alm takes loss.temperature for both sides"
    ):
        FusionLoss("alm", student_temperature=2.0)


@pytest.mark.parametrize("rule", [{"rule": "avg_ce"}, {"level": "token"}])
def test_chunks_are_of_one_model(rule: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"loss.kind=alm compares chunks of text, .* set fusion=min_ce fusion.level="):
        check_rule(FusionRule(**rule), FusionLoss("alm"))
    check_rule(FusionRule(), FusionLoss("alm"))
    check_rule(FusionRule("sft", level="token"), FusionLoss("alm"))


def alpha(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Alpha divergence at 1/2, as a user would write it: 4 (1 - sum sqrt(p q))."""
    return 4 * (1 - (0.5 * (log_p + log_q)).exp().sum(-1))


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("student_temperature", [1.0, 2.0])
def test_a_loss_of_the_users_own_trains_through_autograd(
    missing: str, student_temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOSSES, "_members", dict(LOSSES._members))
    LOSSES.register("alpha", "alpha divergence at 1/2")(alpha)
    loss = FusionLoss("alpha", missing, student_temperature=student_temperature)
    logits, logprobs, raw = example(7, 12, 4)
    logits, targets = logits.double(), in_float64(replace(raw, p=loss.teacher(logprobs.double())))

    def naive(z: Tensor) -> Tensor:
        q = (z / student_temperature).softmax(-1).gather(1, targets.ids)
        p, q = (targets.p, torch.where(targets.p > 0, q, 0.0))
        if missing == "tail":
            p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], 1) for x in (p, q))
        safe = torch.where(p > 0, p * q, 1.0)
        divergence = 4 * (1 - torch.where(p > 0, safe.sqrt(), 0.0).sum(-1))
        sft = torch.nn.functional.cross_entropy(z, targets.gold, reduction="none")
        return (sft * targets.sft_weight + divergence * targets.fusion_weight).sum()

    ours = lambda z: loss_from_logits(z * 1.0, targets, loss)[0]
    leaf, reference = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    log_q = (logits / student_temperature).log_softmax(-1).gather(1, targets.ids).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss.divergence(targets.p, x), (log_q,))
    assert ours(leaf).item() == pytest.approx(naive(reference).item(), abs=1e-12)
    (ours_gradient,) = torch.autograd.grad(ours(leaf), leaf)
    (wanted,) = torch.autograd.grad(naive(reference), reference)
    assert (ours_gradient - wanted).abs().max() < 1e-12
    assert (wanted - torch.autograd.grad(ours(reference), reference)[0]).abs().max() < 1e-12


def test_ranked_losses_sort_what_a_rule_has_mixed() -> None:
    loss = FusionLoss("uld")
    logits, logprobs, raw = example(9, 20, 5)
    targets, order = replace(raw, p=loss.teacher(logprobs)), torch.tensor([3, 0, 4, 1, 2])
    mixed = replace(targets, ids=targets.ids[:, order], p=targets.p[:, order])
    assert torch.equal(*(loss_from_logits(logits.clone(), t, loss)[0] for t in (targets, mixed)))


def test_groups_list_the_families() -> None:
    for family, group in ((LOSSES, "loss.kind"), (RULES, "fusion.rule")):
        assert choices(group) == {name: member.help for name, member in family.items()}


def test_rows_without_entries_have_no_fusion_gradient() -> None:
    loss = FusionLoss()
    logits = torch.randn(3, 10, requires_grad=True)
    p = loss.teacher(torch.full((3, 4), -torch.inf))
    value, _ = loss_from_logits(
        logits * 1.0,
        Targets(
            torch.zeros(3, 4, dtype=torch.long), p, torch.zeros(3, dtype=torch.long), torch.zeros(3), torch.ones(3)
        ),
        loss,
    )
    value.backward()
    assert value.item() == 0
    assert logits.grad.abs().max() == 0


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


def test_unknown_names() -> None:
    with pytest.raises(
        UserError,
        match=r"loss\.kind='mse' is unknown; use one of: alm, ce, forward_kl, hybrid, jsd, reverse_kl, standardized_uld, uld",
    ):
        FusionLoss("mse")
    with pytest.raises(UserError, match=r"loss\.missing_mass='drop' is unknown"):
        FusionLoss("ce", "drop")
