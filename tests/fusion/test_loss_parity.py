"""Losses equal those of the published trainers."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusechat.fusion.gradient import loss_from_logits
from fusechat.fusion.losses import FusionLoss
from fusechat.fusion.rules import FusionRule
from fusechat.fusion.targets import Targets
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
