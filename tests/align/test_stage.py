"""The alignment stage: pass-through, kinds, the independence of processes, resumption, and bad input."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from fusechat.align.checks import same_tokens
from fusechat.align.maps import TOKEN_MAPS
from fusechat.align.sequence import SEQUENCES
from fusechat.models import load as load_module
from fusechat.stores.encoding import decode_logprobs
from fusechat.stores.kinds import KINDS, NONE, SAME
from fusechat.stores.store import DistributionStore
from fusechat.stores.writer import StoreWriter, list_column
from tests.conftest import ROOT, Mini


def aligned(world: Mini, name: str = "a") -> DistributionStore:
    return DistributionStore(world.experiment / "aligned" / name)


def test_a_shared_vocabulary_passes_through_without_a_copy(mini: Mini) -> None:
    store = aligned(mini, "pivot")
    assert store.manifest["token_map"] == "same"
    for entry in store.manifest["shards"]:
        assert (store.path / entry["file"]).stat().st_ino == (
            mini.experiment / "distributions/pivot" / entry["file"]
        ).stat().st_ino


@pytest.mark.parametrize("source", ["a", "b", "c"])
def test_rows_belong_to_the_pivots_positions(source: str, mini: Mini) -> None:
    pivot, store = DistributionStore(mini.experiment / "distributions/pivot"), aligned(mini, source)
    kinds = np.zeros(len(KINDS))
    for row in range(len(store)):
        (positions,), (counts, ids, kind, logprobs) = (
            pivot.row(row, "positions"),
            store.row(row, "counts", "ids", "kind", "logprobs"),
        )
        assert len(counts) == len(kind) == len(positions)
        assert counts.sum() == len(ids)
        assert ((counts > 0) <= (kind != NONE)).all(), "no distribution without a partner"
        assert not len(ids) or ids.max() < pivot.manifest["vocab_size"]
        mass = (
            np.add.reduceat(np.exp(decode_logprobs(logprobs)), np.cumsum([0, *counts[:-1]])[counts > 0])
            if len(ids)
            else np.zeros(1)
        )
        assert (mass <= 1.01).all()
        kinds += np.bincount(kind, minlength=len(KINDS))
    assert kinds[SAME] > kinds[NONE], "most positions of a shared text have a partner"


@pytest.mark.parametrize("token_map", sorted(TOKEN_MAPS))
@pytest.mark.parametrize("sequence", sorted(SEQUENCES))
def test_every_map_with_either_alignment(token_map: str, sequence: str, fresh: Mini) -> None:
    fresh.run(
        "align",
        "source=b",
        f"token_map={token_map}",
        f"alignment.sequence={sequence}",
        "alignment.unmatched=gold",
        "overwrite=true",
    )
    store = aligned(fresh, "b")
    assert (store.manifest["token_map"], store.manifest["sequence"]) == (token_map, sequence)
    for row in range(len(store)):
        counts, kind = store.row(row, "counts", "kind")
        assert (counts[kind == NONE] == (0 if token_map == "uld" else 1)).all()


@pytest.mark.parametrize("source", ["a", "b", "c"])
def test_prefix_keeps_the_gold_tokens_probability(source: str, mini: Mini) -> None:
    """Where every pivot position has a partner, the chain rule leaves the response as likely as the source had it."""
    own, store, whole = DistributionStore(mini.experiment / "distributions" / source), aligned(mini, source), 0
    for row in range(len(store)):
        gold, kind = store.row(row, "gold_logprob", "kind")
        if len(kind) and not (kind == NONE).any():
            whole += 1
            assert -gold.astype(np.float64).sum() <= own.column("nats")[row] * 1.01 + 0.1
    assert whole > 3


def test_the_result_does_not_depend_on_processes_or_interruptions(fresh: Mini) -> None:
    hashes = lambda: [entry["xxh3_128"] for entry in aligned(fresh, "a").manifest["shards"]]
    wanted = hashes()
    fresh.run("align", "source=a", "alignment.num_proc=2", "overwrite=true")
    assert hashes() == wanted
    store = aligned(fresh, "a")
    for index, entry in enumerate(store.manifest["shards"]):
        (store.path / f"shard-{index:05d}.json").write_text(json.dumps(entry))
    (store.path / "manifest.json").unlink()
    (store.path / store.manifest["shards"][1]["file"]).write_bytes(b"cut short")
    fresh.run("align", "source=a")
    assert hashes() == wanted


def test_a_slow_tokenizer_is_aligned_by_dtw(fresh: Mini, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    path, tokenizer = fresh.root / "slow", ByT5Tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **shape)).save_pretrained(
        path
    )
    tokenizer.save_pretrained(path)
    options = ["source.name=slow", f"source.path={path}", "chat.max_length=1024", "chat.template=pivot"]
    fresh.run("extract", *options)
    fresh.run("align", *options, "token_map=mined")
    store, own = aligned(fresh, "slow"), DistributionStore(fresh.experiment / "distributions/slow")
    assert (own.manifest["offsets"], store.manifest["sequence"]) == (False, "dtw")
    assert "a slow tokenizer reports no offsets: aligned by alignment.sequence=dtw instead" in caplog.text
    kinds = sum(np.bincount(store.row(row, "kind")[0], minlength=len(KINDS)) for row in range(len(store)))
    assert kinds[NONE] < kinds.sum() / 2
    chat = datasets.load_dataset("json", data_files=str(fresh.experiment / "world/chats/fusion.jsonl"), split="train")[
        0
    ]["messages"]
    (ids, positions), answer = (
        own.row(0, "input_ids", "positions"),
        "".join(m["content"] for m in chat if m["role"] == "assistant"),
    )
    assert tokenizer.decode(ids[positions + 1]).startswith(answer)


def test_empty_answers_and_tokens_without_a_text(fresh: Mini) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]}
        for text in ("", "a \u200b b", "\x00", "a b")
    ]
    chats = fresh.root / "odd.jsonl"
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for sequence in ("offsets", "dtw"):
        for name in ("pivot", "a"):
            fresh.run("extract", f"source={name}", f"chat.path={chats}", "overwrite=true")
        fresh.run("align", "source=a", f"alignment.sequence={sequence}", "overwrite=true")
        store, pivot = aligned(fresh, "a"), DistributionStore(fresh.experiment / "distributions/pivot")
        for row in range(4):
            assert len(store.row(row, "counts")[0]) == len(pivot.row(row, "positions")[0])
        assert len(store.row(3, "ids")[0]) > 0


def test_the_command_that_mends_it_names_the_experiment_it_was_given(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fusechat.align",
        "experiment=fusechat_7b_varm",
        "experiment_name=mine",
        f"paths.root={tmp_path}",
        "source=nh2_solar",
        "logger=csv",
    ]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=100)
    assert (
        "make it with: python -m fusechat.extract experiment=fusechat_7b_varm experiment_name=mine source=pivot"
        in done.stdout + done.stderr
    )
    assert "Traceback" not in done.stderr


def test_the_same_tokens_in_other_shards_and_types(tmp_path: Path) -> None:
    ids, positions = [np.arange(n) + 5 for n in (2, 7, 3, 4)], [np.array([0, n]) for n in (1, 6, 2, 3)]

    def stored(name: str, cuts: list[int], dtype: type, last: int) -> DistributionStore:
        writer, rows = StoreWriter(tmp_path / name, "mark", len(cuts) - 1), [*ids[:3], np.append(ids[3][:-1], last)]
        for index, (first, end) in enumerate(pairwise(cuts)):
            lists = {
                "input_ids": list_column(rows[first:end], dtype),
                "positions": list_column(positions[first:end], dtype),
            }
            writer.write(index, pa.table(lists), {})
        writer.finish()
        return DistributionStore(tmp_path / name)

    pivot, same = stored("pivot", [0, 2, 4], np.uint16, 8), stored("same", [0, 1, 3, 4], np.uint32, 8)
    assert same_tokens(pivot, same)
    assert same_tokens(same, pivot)
    assert not same_tokens(pivot, stored("other", [0, 2, 4], np.uint16, 9))
    assert not same_tokens(pivot, stored("fewer", [0, 2, 3], np.uint16, 8))


def test_tokenizers_of_both_sides_are_loaded_as_their_sections_say(
    fresh: Mini, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pivot whose tokenizer is code of its authors is opened as it was by extract."""
    seen, load = dict[str, Any](), load_module.load_tokenizer

    def loaded(path: str, **options: Any) -> Any:
        seen[Path(path).name] = options
        return load(path)

    monkeypatch.setattr(load_module, "load_tokenizer", loaded)
    of_pivot, of_source = "pivot.trust_remote_code=true", "source.revision=abc"
    fresh.run("align", "source=a", of_pivot, of_source, "overwrite=true", "alignment=chain")
    assert seen == {
        "pivot": {"revision": None, "trust_remote_code": True},
        "a": {"revision": "abc", "trust_remote_code": False},
    }
