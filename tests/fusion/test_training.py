"""Training: the order of chats, steps that do not depend on how they are shared, resumption bit for bit, and bad input."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from fusechat.app.errors import UserError
from fusechat.app.outputs import fingerprint
from fusechat.fusion import LOSSES, FusionLoss, FusionRule, Optimizer
from fusechat.fusion import train as fuse
from fusechat.fusion.batches import FusionBatch, FusionRows
from fusechat.fusion.inputs import open_stores
from fusechat.fusion.module import FusionModule
from fusechat.fusion.options import Data
from fusechat.fusion.plan import Draw, Plan
from fusechat.models.load import model_identity
from fusechat.models.whole import write_record
from tests.conftest import ROOT, Mini
from tests.spoiling import replaced, spoil


def weights(world: Mini, name: str) -> dict[str, torch.Tensor]:
    return load_file(world.experiment / "targets" / name / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of any weight."""
    assert a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a)


def moved(world: Mini, name: str) -> float:
    """How far training took a target from the pivot."""
    return distance(weights(world, name), load_file(world.experiment / "world/models/pivot/model.safetensors"))


def rows_of(world: Mini, *sources: str) -> FusionRows:
    """The pivot's store and the sources', zipped."""
    names = sources or ("a",)
    return FusionRows(
        open_stores(world.experiment / "distributions/pivot", [world.experiment / "aligned" / n for n in names]), 0
    )


def module_of(world: Mini, loss: FusionLoss, rule: FusionRule | None = None) -> FusionModule:
    """The pivot, about to be trained on source a."""
    module = FusionModule(str(world.experiment / "world/models/pivot"), ["a"], rule=rule, loss=loss)
    module.configure_model()
    return module


EXACT = ["pivot.dtype=float64", "trainer.precision=64-true", "trainer.gradient_clip_val=null", "trainer.max_steps=3"]
"""Sums taken in another order differ in their rounding, which Adam blows up: fp64 leaves it far below these tests' bounds."""


def plan(rows: int, **options: Any) -> Plan:
    lengths = np.random.default_rng(0).integers(3, 40, rows)
    settings = {"batch_size": 2, "step": 4, "rank": 0, "world": 1, "seed": 0, "bucket": 4} | options
    return Plan(np.arange(rows), lengths, lengths // 2, **settings)


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_every_chat_once_and_every_rank_the_same_number(rows: int, batch: int, accumulate: int, world: int) -> None:
    step = batch * accumulate * world
    plans = [plan(rows, batch_size=batch, step=step, rank=r, world=world) for r in range(world)]
    draws = [list(p) for p in plans]
    assert {len(d) for d in draws} == {len(plans[0])}
    assert sorted(row for d in draws for draw in d for row in draw.rows) == list(range(rows))
    ends = [plans[0].micro_batches(n) for n in range(plans[0].optimizer_steps + 1)]
    assert (ends[0], ends[-1]) == (0, len(plans[0]))
    assert [plans[0].steps_done(n) for n in ends] == list(range(len(ends)))


def test_steps_do_not_depend_on_how_they_are_shared() -> None:
    steps = {}
    for batch, accumulate, world in ((8, 1, 1), (2, 4, 1), (2, 2, 2), (4, 1, 2), (1, 2, 4)):
        plans = [plan(45, batch_size=batch, step=8, rank=r, world=world) for r in range(world)]
        draws = [list(p) for p in plans]
        together = [sum((draw.rows for draw in micro), []) for micro in zip(*draws, strict=True)]
        ends = [plans[0].micro_batches(n) for n in range(plans[0].optimizer_steps + 1)]
        steps[batch, accumulate, world] = [sorted(sum(together[i:j], [])) for i, j in itertools.pairwise(ends)]
        assert ends[1] == accumulate
        tokens = {draw.step_tokens for draw in draws[0][:accumulate]}
        assert len(tokens) == 1
    assert [len(step) for step in steps[8, 1, 1]] == [8, 8, 8, 8, 8, 5]
    assert all(value == steps[8, 1, 1] for value in steps.values())


def test_a_resumed_plan_goes_on() -> None:
    whole, rest = plan(33), plan(33)
    rest.start = 3
    assert list(whole)[6:] == list(rest)
    assert list(rest) == list(plan(33)), "only the resumed epoch is cut"


def test_epochs_differ() -> None:
    first, second = plan(33), plan(33)
    second.set_epoch(1)
    assert list(first) != list(second)


def test_accumulation_equals_one_large_batch(fresh: Mini) -> None:
    common = [*EXACT, "source=a", "data.bucket=1"]
    fresh.run("train", "run_name=whole", "data.global_batch=8", *common)
    fresh.run("train", "run_name=parts", "data.global_batch=8", "data.batch_size=2", *common)
    assert distance(weights(fresh, "whole"), weights(fresh, "parts")) < 1e-9
    assert moved(fresh, "whole") > 1e-3


def test_chunked_and_own_logits_train_alike(fresh: Mini) -> None:
    for chunked in ("true", "false"):
        fresh.run("train", "source=b", f"run_name=chunked_{chunked}", f"loss.chunked={chunked}", *EXACT)
    assert distance(weights(fresh, "chunked_true"), weights(fresh, "chunked_false")) < 1e-9
    assert moved(fresh, "chunked_true") > 1e-3


def test_kill_and_resume_is_bit_for_bit(fresh: Mini) -> None:
    common = [
        "source=a",
        "trainer.max_steps=40",
        "callbacks.checkpoint_every_n_steps=5",
        "data.global_batch=4",
        "data.shuffle_seed=7",
    ]
    fresh.run("train", "run_name=whole", *common)
    folder = fresh.experiment / "checkpoints"
    process = subprocess.Popen(
        [sys.executable, "train.py", *fresh.base, "run_name=killed", *common],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 180
    while time.time() < deadline and process.poll() is None and not list(folder.glob("killed-*/*.ckpt")):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(folder.glob("killed-*/*.ckpt")), "the run was killed before it had a checkpoint, or after it had ended"
    assert not (fresh.experiment / "targets/killed").exists()
    fresh.run("train", "run_name=killed", *common)
    assert equal(weights(fresh, "whole"), weights(fresh, "killed"))
    assert not list(folder.glob("killed-*")), "checkpoints of a finished run are removed"


def test_a_checkpoint_cut_short_is_passed_over(tmp_path: Path) -> None:
    from fusechat.fusion.checkpoints import latest_checkpoint

    torch.save({"a": 1}, tmp_path / "step=5.ckpt")
    (tmp_path / "step=10.ckpt").write_bytes((tmp_path / "step=5.ckpt").read_bytes()[:-50])
    assert latest_checkpoint(tmp_path) == tmp_path / "step=5.ckpt"


def test_target_is_a_model_with_its_record(fresh: Mini) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    fresh.run("train", "sources=[a,b,c]", "run_name=many", "trainer.log_every_n_steps=2")
    path = fresh.experiment / "targets/many"
    generate = pipeline(
        "text-generation",
        model=AutoModelForCausalLM.from_pretrained(path),
        tokenizer=AutoTokenizer.from_pretrained(path),
    )
    assert (
        generate([{"role": "user", "content": "Sort b a."}], max_new_tokens=2)[0]["generated_text"][-1]["role"]
        == "assistant"
    )
    record = json.loads((path / "fusechat.json").read_text())
    assert record["sources"] == ["a", "b", "c"]
    assert sum(record["wins"]["all"].values()) == pytest.approx(1)
    assert set(record["coverage"]) == {"a", "b", "c"}
    logged = next((fresh.experiment / "logs").rglob("*many/*/metrics.csv")).read_text().splitlines()[0].split(",")
    assert {
        "train/sft",
        "train/fusion",
        "train/gradient_norm",
        "train/tokens_per_second",
        "coverage/b",
        "wins/all/pivot",
    } <= set(logged)
    assert (path / "README.md").exists()
    assert not list((fresh.experiment / "targets").glob(".*.tmp"))


def test_the_metric_is_of_the_target_that_was_saved(fresh: Mini) -> None:
    from fusechat.merge_search import held_out_chats
    from tests.test_sweeps import scored_one_by_one

    options = [
        "validation.path=null",
        "data.validation_fraction=0.3",
        "trainer.max_steps=12",
        "optimizer.lr=0.01",
    ]  # ends in mid-epoch: nine steps each
    value = fresh.run("train", "source=a", *options)
    path = fresh.experiment / "targets/a"
    assert value == pytest.approx(scored_one_by_one(path, held_out_chats(fresh.cfg("train", *options))), rel=1e-3)
    assert json.loads((path / "fusechat.json").read_text())["metrics"]["validation/bits_per_byte"] == value
    assert f"validation/bits_per_byte | {value:.4f}" in (path / "README.md").read_text()


def test_own_chats_validate_and_all_others_train(fresh: Mini) -> None:
    """Bits per byte of the target that was saved, over the chats of validation.path; nothing is held out for it."""
    from fusechat.evaluate import evaluate
    from fusechat.merge_search import held_out_chats

    chats = fresh.experiment / "world/chats/validation.jsonl"
    value = fresh.run("train", "source=a", "trainer.max_epochs=1", "trainer.max_steps=-1")
    target = fresh.experiment / "targets/a"
    measured = evaluate(target, chats, fresh.root / "validation.json", generate=False)["metrics"]
    assert value == pytest.approx(measured["bits_per_byte"]["all"]["value"], rel=1e-4)
    record = json.loads((target / "fusechat.json").read_text())
    assert {name for name in record["metrics"] if name.startswith("validation/")} == {
        "validation/loss",
        "validation/sft",
        "validation/bits_per_byte",
    }
    assert record["metrics"]["validation/loss"] == pytest.approx(record["metrics"]["validation/sft"], rel=1e-5)
    assert record["steps"] == 12, "96 chats, 8 a step"
    assert len(held_out_chats(fresh.cfg("merge_search"))) == len(chats.read_text().splitlines()) == 16
    with pytest.raises(UserError, match="made with other settings"):
        chats.write_text(chats.read_text().splitlines()[0] + "\n")
        fresh.run("train", "source=a", "trainer.max_epochs=1", "trainer.max_steps=-1")


def test_validation_chats_without_an_answer_are_refused(fresh: Mini, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "Who?"}]}) + "\n")
    with pytest.raises(UserError, match=r"validation\.path=.*: the assistant has no text in any of 1 chats"):
        fresh.run("train", "source=a", f"validation.path={chats}")
    with pytest.raises(UserError, match=r"validation\.path=.*missing\.jsonl: "):
        fresh.run("train", "source=a", "validation.path=missing.jsonl")


def test_sft_needs_no_aligned_store(fresh: Mini) -> None:
    shutil.rmtree(fresh.experiment / "aligned")
    value = fresh.run("train", "fusion=sft", "run_name=sft")
    record = json.loads((fresh.experiment / "targets/sft/fusechat.json").read_text())
    assert record["metrics"]["validation/bits_per_byte"] == value
    assert record["metrics"]["validation/loss"] == pytest.approx(record["metrics"]["validation/sft"], rel=1e-5)
    assert (record["sources"], record["wins"]["all"]) == ([], {"pivot": 1.0})
    assert moved(fresh, "sft") > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        ["fusion=avg_ce", "loss.kind=forward_kl", "loss.missing_mass=tail"],
        ["fusion.level=token", "loss.kind=jsd"],
        ["loss.kind=reverse_kl", "loss.schedule=hard_and_decay"],
        ["fusion.metric=nats_per_token", "loss.schedule=soft", "fusion.empty=pivot"],
        ["fusion.include_pivot=false", "loss.temperature=2.0"],
        ["gradient_checkpointing=true", "callbacks.early_stopping=1", "trainer.max_steps=24"],
    ],
    ids=lambda o: " ".join(o),
)
def test_every_option_trains(options: list[str], fresh: Mini) -> None:
    short = ["source=c", "trainer.max_steps=2"]
    assert fresh.run("train", *short, *options) is not None
    fresh.run("train", *short, "run_name=default")
    assert distance(weights(fresh, "c"), weights(fresh, "default")) > 1e-6, "the option decides something"
    assert moved(fresh, "c") > 1e-4


def test_uld_trains_on_unmapped_distributions(fresh: Mini) -> None:
    fresh.run("align", "source=b", "token_map=uld", "overwrite=true")
    fresh.run("train", "source=b", "loss.kind=uld", "fusion.include_pivot=false", "validation.path=null")
    record = json.loads((fresh.experiment / "targets/b/fusechat.json").read_text())
    assert record["wins"]["all"] == {"b": 1.0}
    assert 0 < record["metrics"]["validation/fusion"] <= 2, "the distance of two distributions"


def test_lora_is_merged_on_export(fresh: Mini) -> None:
    fresh.run("train", "source=a", "lora.enabled=true", "lora.r=2")
    pivot = load_file(fresh.experiment / "world/models/pivot/model.safetensors")
    target = weights(fresh, "a")
    assert target.keys() == pivot.keys()
    assert all(torch.equal(target[n], pivot[n]) == ("proj" not in n) for n in pivot), "every linear layer, nothing else"


def test_finished_targets_are_skipped_and_others_refused(fresh: Mini) -> None:
    first = fresh.run("train", "source=a")
    before = (fresh.experiment / "targets/a/model.safetensors").stat().st_mtime_ns
    assert fresh.run("train", "source=a") == pytest.approx(first)
    assert (fresh.experiment / "targets/a/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(
        UserError,
        match=r"holds a target made with other settings .*add overwrite=true to replace it, or run_name=NAME to keep both",
    ):
        fresh.run("train", "source=a", "loss.lm_weight=0.3")


def naive(module: FusionModule, batch: FusionBatch) -> torch.Tensor:
    """L of a batch by the paper's equations, one position at a time, with MinCE over the sequence."""
    logits = module.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
    ce, total = batch.nats / batch.n_bytes, torch.tensor(0.0)
    for n, place in enumerate(batch.at.tolist()):
        best = int(ce[batch.sequence[n]].argmin())
        log_q, logprobs = logits[place].log_softmax(-1), batch.logprobs[best, n]
        lam = module.loss.lm_weight if (logprobs > -torch.inf).any() else 1.0
        total = total - lam * log_q[batch.gold[n]]
        if lam < 1:
            p = logprobs.softmax(-1)
            total = total - (1 - lam) * (p * log_q[batch.ids[best, n].long()]).sum()
    return total / batch.step_tokens


def test_the_loss_is_the_papers(mini: Mini) -> None:
    module, rows = module_of(mini, FusionLoss(lm_weight=0.3)), rows_of(mini)
    torch.nn.init.normal_(module.model.lm_head.weight)  # hardly trained, it gives every token the same probability
    chats = [*range(24)]
    batch = rows[Draw(chats, int(rows.scalars["tokens"][chats, 0].sum()))]
    wanted = naive(module, batch)
    total, *_ = module._losses(batch)
    assert total.item() == pytest.approx(wanted.item(), rel=1e-4)
    module.loss = FusionLoss(lm_weight=0.9)
    assert total.item() != pytest.approx(naive(module, batch).item(), rel=1e-3)


def test_lambda_is_one_where_there_is_nothing_to_fuse(mini: Mini) -> None:
    """Positions without a distribution learn from their token at full weight; the others share as lambda says."""
    module, rows = module_of(mini, FusionLoss(lm_weight=0.3), FusionRule(include_pivot=False)), rows_of(mini)
    batch = rows[Draw([0, 5, 11], 1)]
    targets, _ = module.targets(batch)
    fused = (targets.p > 0).any(-1)
    assert fused.any()
    assert not fused.all()
    assert torch.allclose(targets.sft_weight, torch.where(fused, 0.3, 1.0))
    assert torch.allclose(targets.sft_weight + targets.fusion_weight, torch.ones(len(fused)))


def test_train_needs_no_config(fresh: Mini) -> None:
    place, store = fresh.experiment, fresh.experiment / "distributions/pivot"
    value = fuse(
        place / "world/models/pivot",
        store,
        {"a": place / "aligned/a"},
        place / "targets/mine",
        loss=FusionLoss(lm_weight=0.5),
        optimizer=Optimizer(lr=1e-3),
        data=Data(global_batch=8, shuffle_seed=1),
        trainer={"max_steps": 2, "max_epochs": -1},
        max_length=256,
        validation=place / "world/chats/validation.jsonl",
        record={"note": "by hand"},
    )
    record = json.loads((place / "targets/mine/fusechat.json").read_text())
    assert (record["note"], record["metrics"]["validation/bits_per_byte"]) == ("by hand", value)
    fresh.run("train", "source=a", "run_name=theirs", "trainer.max_steps=2", "data.shuffle_seed=1")
    assert equal(weights(fresh, "mine"), weights(fresh, "theirs")), "the command does the same"
    theirs = json.loads((place / "targets/theirs/fusechat.json").read_text())
    assert theirs["fingerprint"] == record["fingerprint"]


SAME = ["trainer.max_steps=2", "validation.path=null"]


def test_a_target_from_before_global_batch_is_kept(fresh: Mini) -> None:
    """Its fingerprint held micro-batches and accumulation; with one device their product is the step."""
    fresh.run("train", "source=a", *SAME)
    path = fresh.experiment / "targets/a/fusechat.json"
    record = json.loads(path.read_text())
    parts, config = earlier_parts(fresh, record)
    fresh_mark = record["fingerprint"]
    record |= {"config": config, "fingerprint": fingerprint(**parts)}
    write_record(path.parent, record)
    before = (path.parent / "model.safetensors").stat().st_mtime_ns
    fresh.run("train", "source=a", *SAME)
    assert (path.parent / "model.safetensors").stat().st_mtime_ns == before
    assert record["fingerprint"] != fresh_mark
    for other in ("data.global_batch=4", "trainer.max_steps=3", "data.bucket=1"):
        with pytest.raises(UserError, match="made with other settings"):
            fresh.run("train", "source=a", *SAME, other)
    write_record(path.parent, record | {"config": config | {"trainer": config["trainer"] | {"devices": 2}}})
    with pytest.raises(
        UserError, match=r"does not say how many chats made a step: 8 on each of trainer\.devices=2; add"
    ):
        fresh.run("train", "source=a", *SAME)


def earlier_parts(world: Mini, record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an earlier version put into the fingerprint of this target, and into its record's config."""
    cfg = record["config"]
    data = {k: v for k, v in cfg["data"].items() if k != "global_batch"} | {"batch_size": 4}
    trainer = {k: v for k, v in cfg["trainer"].items() if k != "timeout"} | {"accumulate_grad_batches": 2}
    shown = {"devices", "num_nodes", "accelerator", "log_every_n_steps", "enable_model_summary"}
    stores = [world.experiment / "distributions/pivot", world.experiment / "aligned/a"]
    parts = {
        "pivot": model_identity(str(world.experiment / "world/models/pivot")),
        "stores": [json.loads((store / "manifest.json").read_text())["fingerprint"] for store in stores],
        "dtype": "float32",
        "fusion": cfg["fusion"],
        "loss": cfg["loss"],
        "optimizer": cfg["optimizer"],
        "data": data,
        "lora": cfg["lora"],
        "trainer": {k: v for k, v in trainer.items() if k not in shown},
        "seed": 0,
        "gradient_checkpointing": False,
    }
    return parts, cfg | {"data": data, "trainer": trainer}


def test_a_users_module_is_part_of_the_fingerprint(
    fresh: Mini, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOSSES, "_members", dict(LOSSES._members))
    monkeypatch.chdir(tmp_path)
    source = """
from fusechat.fusion import LOSSES


@LOSSES.register("half_alpha", "alpha divergence at 1/2")
def half_alpha(p, log_p, log_q):
    return 4 * (1 - (0.5 * (log_p + log_q)).exp().sum(-1))
"""
    (tmp_path / "losses_of_mine.py").write_text(source)
    options = ["source=a", "loss.kind=half_alpha", "trainer.max_steps=2", "validation.path=null"]
    with pytest.raises(UserError, match=r"loss\.kind='half_alpha' is unknown; use one of: alm, ce, forward_kl"):
        fresh.run("train", *options)
    fresh.run("train", *options, "imports=[losses_of_mine]")
    record = json.loads((fresh.experiment / "targets/a/fusechat.json").read_text())
    assert 0 < record["metrics"]["validation/fusion"] <= 4
    (tmp_path / "losses_of_mine.py").write_text(source + "# edited\n")
    with pytest.raises(UserError, match="made with other settings"):
        fresh.run("train", *options, "imports=[losses_of_mine]")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.lm_weight=1.5"], r"loss\.lm_weight=1\.5: expected a number from 0 to 1"),
        (["loss.schedule=up"], r"loss\.schedule='up' is unknown; use one of: hard, hard_and_decay, soft"),
        (["loss.kind=mse"], r"loss\.kind='mse' is unknown"),
        (["fusion.rule=best"], r"fusion\.rule='best' is unknown"),
        (
            ["sources=[zz]"],
            r"aligned/zz does not exist; make it with: python -m fusechat\.align experiment=tiny source=zz",
        ),
        (["data.max_tokens=8"], r"a chat of \d+ tokens exceeds 8"),
        (["validation.path=null", "data.validation_fraction=1.0"], "expected a number from 0 to below 1"),
        (["pivot.path=/nowhere"], "/nowhere"),
    ],
)
def test_bad_settings(overrides: list[str], message: str, mini: Mini) -> None:
    with pytest.raises(UserError, match=message):
        mini.run("train", "source=a", f"output_dir={mini.root}/bad/bad", *overrides)


def test_stores_of_another_pivot_are_refused(fresh: Mini) -> None:
    fresh.run("extract", "source=pivot", "extract.top_k=5", "overwrite=true")
    with pytest.raises(
        UserError,
        match=r"was aligned with other pivot distributions .*run: python -m fusechat\.align .* overwrite=true",
    ):
        fresh.run("train", "source=a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: replaced(t, "logprobs", np.nan),
            r"aligned/a holds ids beyond the pivot's vocabulary, NaN or inf; align again",
        ),
        (
            lambda t: replaced(t, "logprobs", np.inf),
            r"holds ids beyond the pivot's vocabulary, NaN or inf; align again",
        ),
        (lambda t: replaced(t, "ids", 65_535), r"holds ids beyond the pivot's vocabulary, NaN or inf; align again"),
        (
            lambda t: t.slice(1),
            r"aligned/a has 95 chats where .*distributions/pivot has 96; run: python -m fusechat\.align .*overwrite=true",
        ),
    ],
)
def test_spoilt_stores_are_refused(change: Callable[[pa.Table], pa.Table], message: str, fresh: Mini) -> None:
    spoil(fresh.experiment / "aligned/a", change)
    with pytest.raises(UserError, match=message):
        fresh.run("train", "source=a", "trainer.max_steps=20")


def test_a_vocabulary_beyond_the_embedding_is_refused(fresh: Mini) -> None:
    spoil(fresh.experiment / "distributions/pivot", lambda t: t, vocab_size=70_000)
    with pytest.raises(UserError, match=r"has ids up to 70000, the model's embedding \d+ rows; set pivot\.path"):
        fresh.run("train", "source=a")


def test_chunk_likelihood_compares_each_chunk_of_the_chosen_models_text(mini: Mini) -> None:
    """Weighted loss, from hidden states, against a walk over both stores' places; outside all chunks lambda is 1."""
    stores = open_stores(mini.experiment / "distributions/pivot", [mini.experiment / "aligned/a"])
    rows, drawn = FusionRows(stores, 0, chunked=True), [0, 3, 5]
    batch = rows[Draw(drawn, 1)]
    loss, rule = FusionLoss("alm", lm_weight=0.25, temperature=2.0), FusionRule(include_pivot=False)
    module = module_of(mini, loss, rule)
    with torch.no_grad():
        logits = module.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)[
            batch.at
        ]
        log_q = logits.log_softmax(-1).gather(1, batch.gold.unsqueeze(1)).squeeze(1).double()
        total, _, _, _ = module._losses(batch)
    wanted, start, chunks = 0.0, 0, 0
    for row in drawn:
        (spent,) = stores[1].row(row, "spent")
        shared, n = np.flatnonzero(np.isfinite(spent)), len(spent) - 1
        covered = np.zeros(n, bool)
        for begin, end in itertools.pairwise(shared.tolist()):
            a, b = -float(spent[end]) / 2 - 1e-6, float(log_q[start + begin : start + end].sum()) / 2 - 1e-6
            wanted += 0.75 * -(np.exp(a) * b + (1 - np.exp(a)) * np.log(1 - np.exp(b)))
            covered[begin:end] = True
            chunks += 1
        sft = -log_q[start : start + n].numpy()
        wanted += float((sft * np.where(covered, 0.25, 1.0)).sum())
        start += n
    assert chunks > 10
    assert total.item() == pytest.approx(wanted, rel=1e-4)


def test_chunk_likelihood_trains_a_target(fresh: Mini) -> None:
    fresh.run("train", "source=a", "loss=alm", "run_name=alm")
    assert moved(fresh, "alm") > 1e-4
    with pytest.raises(
        UserError, match=r"loss.kind=alm compares chunks of text, .*set fusion=min_ce fusion.level=sequence"
    ):
        fresh.run("train", "source=a", "loss=alm", "fusion=avg_ce", "run_name=mixed")
    assert not (fresh.experiment / "targets/mixed").exists()
