"""Extraction: against a naive loop, resumed after kill -9 byte for byte, readable without our code, and bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from fusechat.app.errors import UserError
from fusechat.app.outputs import read_json
from fusechat.chats.formats import load_chats
from fusechat.chats.render import ChatRenderer
from fusechat.extract.summary import summary, totals
from fusechat.models.whole import accept
from fusechat.stores.encoding import decode_logprobs
from fusechat.stores.store import DistributionStore
from tests.conftest import ROOT, Mini


def shards(path: Path) -> list[str]:
    return [entry["xxh3_128"] for entry in DistributionStore(path).manifest["shards"]]


@pytest.mark.parametrize("source", ["pivot", "a", "b", "c"])
def test_store_equals_a_naive_loop(source: str, mini: Mini) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = mini.experiment / "world/models" / source
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    chats, _ = load_chats(str(mini.experiment / "world/chats/fusion.jsonl"))
    store = DistributionStore(mini.experiment / "distributions" / source)
    assert len(store) == len(chats) == 96
    store.verify()
    for row in (0, 40, 95):
        rendered = ChatRenderer(tokenizer)([chats[row]["messages"]])[0]
        with torch.no_grad():
            logprobs = model(torch.from_numpy(rendered.input_ids)[None]).logits[0].float().log_softmax(-1)
        ids, positions, stored, gold, counts = store.row(row, "ids", "positions", "logprobs", "gold_logprob", "counts")
        wanted = logprobs[rendered.positions].topk(10)
        assert positions.tolist() == rendered.positions.tolist()
        assert counts.tolist() == [10] * len(positions)
        assert np.allclose(decode_logprobs(stored).reshape(-1, 10), wanted.values, atol=0.02)
        assert np.mean(ids.reshape(-1, 10) == wanted.indices.numpy()) > 0.99
        nats = -logprobs[rendered.positions, rendered.input_ids[rendered.positions + 1]].sum()
        assert store.column("nats")[row] == pytest.approx(float(nats), rel=1e-3)
        assert np.allclose(-gold.astype(np.float32).sum(), float(nats), rtol=1e-2)


def test_datasets_opens_it_without_our_code(mini: Mini) -> None:
    path = mini.experiment / "distributions/a"
    rows = datasets.load_from_disk(str(path))
    assert len(rows) == 96
    first, end = rows[0]["positions"]
    assert (rows[0]["counts"], len(rows[0]["ids"])) == ([10], 10 * (end - first))
    files = sorted(str(f) for f in path.glob("*.arrow"))
    assert (
        len(datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(mini.root / "cache"))) == 96
    )


def test_summary_counts(mini: Mini) -> None:
    store = DistributionStore(mini.experiment / "distributions/pivot")
    assert totals(store.manifest)["positions"] == sum(len(store.row(i, "positions")[0]) for i in range(96))
    assert "bits per byte" in summary(store.manifest, store.path)
    per_token = sum(e["bytes"] for e in store.manifest["shards"]) / totals(store.manifest)["tokens"]
    assert per_token <= 40


def test_uint8_takes_fewer_bytes(fresh: Mini) -> None:
    before = sum(e["bytes"] for e in DistributionStore(fresh.experiment / "distributions/a").manifest["shards"])
    fresh.run("extract", "source=a", "store.logprobs=uint8", "overwrite=true")
    assert (
        sum(e["bytes"] for e in DistributionStore(fresh.experiment / "distributions/a").manifest["shards"])
        < 0.95 * before
    )


def test_from_python(mini: Mini, tmp_path: Path) -> None:
    """The function without Hydra makes the command's store; what is there already is returned as it is."""
    from fusechat.extract import extract

    world, made = mini.experiment / "world", []
    settings = {"template": "native", "max_length": 256, "rows_per_shard": 32, "tokens_per_batch": 1024}
    call = lambda **more: extract(
        str(world / "models/a"),
        world / "chats/fusion.jsonl",
        tmp_path / "a",
        trainer={"accelerator": "cpu", "devices": 1},
        when_made=made.append,
        **settings,
        **more,
    )
    manifest = call()
    assert manifest == read_json(tmp_path / "a/manifest.json") == made[0]
    assert shards(tmp_path / "a") == shards(mini.experiment / "distributions/a")
    assert manifest["fingerprint"] == DistributionStore(mini.experiment / "distributions/a").fingerprint
    assert (call(), len(made)) == (manifest, 1)
    with pytest.raises(UserError, match=r"holds a store made with other settings"):
        call(imports={"my_kinds": "0123"})
    with pytest.raises(UserError, match=r"extract\.top_p=1\.5: expected a number above 0, at most 1"):
        call(top_p=1.5)
    with pytest.raises(UserError, match=r"extract\.draws=0: expected a whole number from 1 on"):
        call(draws=0)


def test_importing_brings_nothing_heavy_and_no_hydra() -> None:
    code = (
        "import sys, fusechat.extract as e; assert 'torch' not in sys.modules\n"
        "e.extract; assert not {'hydra', 'omegaconf', 'wandb', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def command(world: Mini, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "fusechat.extract", *world.base, *overrides]


def test_kill_and_resume_is_byte_for_byte(fresh: Mini) -> None:
    path = fresh.experiment / "distributions/b"
    wanted = shards(path)
    shutil.rmtree(path)
    small = "extract.rows_per_shard=8"
    fresh.run("extract", "source=b", small)
    whole = shards(path)
    shutil.rmtree(path)
    process = subprocess.Popen(
        command(fresh, "source=b", small),
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 120
    while not list(path.glob("shard-*.json")) and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(UserError, match=r"is unfinished; make it with|does not exist"):
        DistributionStore(path)
    (path / ".data-00001-of-00012.arrow.1.tmp").write_bytes(b"killed while writing")
    fresh.run("extract", "source=b", small)
    assert shards(path) == whole
    assert not list(path.glob(".*.tmp"))
    assert len(wanted) == 3


def test_a_corrupt_shard_is_found_and_made_again(fresh: Mini) -> None:
    path = fresh.experiment / "distributions/a"
    wanted, shard = shards(path), path / "data-00001-of-00003.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(
        UserError, match=r"is damaged .*expected.*found\); run: python -m fusechat.extract overwrite=true"
    ):
        DistributionStore(path).verify()
    entries = DistributionStore(path).manifest["shards"]
    (path / "manifest.json").unlink()
    for index, entry in enumerate(entries):
        (path / f"shard-{index:05d}.json").write_text(json.dumps(entry))
    fresh.run("extract", "source=a")
    assert shards(path) == wanted


def test_nan_is_kept_out_and_too_many_stop_the_run(fresh: Mini) -> None:
    from safetensors.torch import load_file, save_file

    file = fresh.experiment / "world/models/a/model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "embed_in" in n)
    chats, _ = load_chats(str(fresh.experiment / "world/chats/fusion.jsonl"))
    rendered = ChatRenderer(__import__("transformers").AutoTokenizer.from_pretrained(file.parent))(
        [chats[5]["messages"]]
    )[0]
    token = int(rendered.input_ids[rendered.positions[0] + 1])
    tensors[name][token] = 3e38  # finite, and too large for what is computed from it
    save_file(tensors, file, metadata={"format": "pt"})
    accept(file.parent)
    with pytest.raises(UserError, match=r"chats gave NaN or inf .*extract\.max_bad_fraction=0\.01; try source\.dtype"):
        fresh.run("extract", "source=a", "overwrite=true")
    fresh.run("extract", "source=a", "overwrite=true", "extract.max_bad_fraction=1.0")
    store = DistributionStore(fresh.experiment / "distributions/a")
    bad = totals(store.manifest)["bad"]
    assert bad
    row = store.column("id").tolist().index(bad[0])
    assert len(store.row(row, "ids")[0]) == 0
    fresh.run("align", "source=a", "overwrite=true")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["extract.top_k=9999"], r"extract\.top_k=9999: expected 1 to \d+, the model's vocabulary"),
        (["chat.max_length=4096"], r"chat\.max_length=4096 exceeds the context of .*set chat\.max_length=512"),
        (["extract.kind=best"], r"extract\.kind='best' is unknown; use one of: sampled, top_k, top_p"),
        (["store.logprobs=int3"], r"store\.logprobs='int3' is unknown"),
        (
            ["extract.top_k=5"],
            r"holds a store made with other settings .*; add overwrite=true to replace it, or output_dir=DIR",
        ),
        (
            ["source.path=/nowhere"],
            r"source\.path=/nowhere does not exist; expected a model's directory, a GGUF file or a Hub id \(owner/name\)",
        ),
        (["output_dir=/proc/x"], r"/proc/x cannot be written .*output_dir=DIR"),
    ],
)
def test_bad_settings(overrides: list[str], message: str, mini: Mini) -> None:
    if overrides == ["extract.top_k=9999"] or overrides == ["chat.max_length=4096"]:
        overrides = [*overrides, f"output_dir={mini.root}/other-{overrides[0][:9]}"]
    with pytest.raises(UserError, match=message):
        mini.run("extract", "source=a", *overrides)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(fresh: Mini) -> None:
    from transformers import AutoTokenizer

    path = fresh.experiment / "world/models/a"
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([f"<new{i}>" for i in range(3)])
    tokenizer.save_pretrained(path)
    accept(path)
    with pytest.raises(UserError, match=r"the tokenizer has \d+ tokens, the model's embedding \d+ rows"):
        fresh.run("extract", "source=a", "overwrite=true")


def test_inspect_prints_samples_and_finds_damage(fresh: Mini) -> None:
    path = fresh.experiment / "distributions/a"
    run = lambda: subprocess.run(
        [sys.executable, "-m", "fusechat.inspect", str(path)], cwd=ROOT, text=True, capture_output=True
    )
    done = run()
    assert done.returncode == 0
    assert "96 chats" in done.stdout
    assert "gold next" in done.stdout
    shard = next(path.glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "is damaged" in run().stderr
    path = fresh.experiment / "world/models/a"
    assert f"{path} is a model, no store of distributions; make one with: python -m fusechat.extract" in run().stderr
