"""What a training leaves: a model with its record, kept where it fits, and the metric of what was saved."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fusechat.app.errors import UserError
from fusechat.app.marks import fingerprint, stamp
from fusechat.app.trees import nested
from fusechat.fusion import LOSSES
from fusechat.fusion.module import FusionModule
from fusechat.models.load import model_identity
from fusechat.models.whole import write_record
from tests.conftest import Mini


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


def test_what_plain_sft_does_not_read_decides_nothing(fresh: Mini) -> None:
    """The weights are the same to the bit, and so is the target; one of an earlier version, too, whatever it said
    there.
    """
    sft = ["fusion=sft", *SAME]
    others = ["loss.kind=jsd", "loss.lm_weight=0.2", "loss.temperature=2.0", "fusion.level=token", "fusion.empty=pivot"]
    fresh.run("train", *sft, "run_name=sft")
    fresh.run("train", *sft, *others, "run_name=others")
    path = fresh.experiment / "targets/sft/fusechat.json"
    files = [path.parents[1] / name / "model.safetensors" for name in ("sft", "others")]
    assert files[0].read_bytes() == files[1].read_bytes()
    record, before = json.loads(path.read_text()), files[0].stat().st_mtime_ns
    fresh.run("train", *sft, *others, "run_name=sft")
    assert "loss.kind" not in record["decided_by"] and files[0].stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"loss\.chunked: true there, false now"):
        fresh.run("train", *sft, "run_name=sft", "loss.chunked=false")
    config = record["config"]
    parts = {**parts_of(record["decided_by"]), "fusion": config["fusion"], "loss": config["loss"]}
    assert fingerprint(**{**parts, "fusion": {"rule": "sft"}, "loss": {"chunked": True}}) == record["fingerprint"]
    write_record(path.parent, record | stamp(fingerprint(**parts)))
    fresh.run("train", *sft, *others, "run_name=sft")
    assert files[0].stat().st_mtime_ns == before
    with pytest.raises(UserError, match="made with other settings"):
        fresh.run("train", *sft, "run_name=sft", "trainer.max_steps=3")
    with pytest.raises(UserError, match="made with other settings"):
        fresh.run("train", *sft, "run_name=sft", "loss.chunked=false")


def test_plain_sft_goes_on_from_a_checkpoint_of_an_earlier_version(
    fresh: Mini, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["train", "fusion=sft", *SAME, "run_name=sft", "callbacks.checkpoint_every_n_steps=1"]
    fresh.run(*run, "callbacks.keep_checkpoints=true")
    target = fresh.experiment / "targets/sft"
    record, weights = json.loads((target / "fusechat.json").read_text()), (target / "model.safetensors").read_bytes()
    parts = {**parts_of(record["decided_by"]), "fusion": record["config"]["fusion"], "loss": record["config"]["loss"]}
    (begun,) = (fresh.experiment / "checkpoints").glob("sft-*")
    begun.rename(begun.with_name(f"sft-{fingerprint(**parts)}"))
    shutil.rmtree(target)
    monkeypatch.setattr(FusionModule, "training_step", lambda *_: pytest.fail("all steps are done"))
    fresh.run(*run)
    assert (target / "model.safetensors").read_bytes() == weights
    assert not [*(fresh.experiment / "checkpoints").glob("sft-*")]


def parts_of(flat: dict[str, Any]) -> dict[str, Any]:
    """What a record's target was decided by, nested again."""
    parts = nested(flat)
    parts.pop("format")
    return parts


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
        "lora": {k: v for k, v in cfg["lora"].items() if k != "adapter"},
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
