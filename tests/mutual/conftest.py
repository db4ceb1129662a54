"""Three small untrained models, public chats, and private chats with a canary in each."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fusechat.fusion import Callbacks, Data, FusionLoss, FusionRule, Optimizer
from fusechat.mutual import mutual
from fusechat.mutual.federation import Client, Federation
from fusechat.mutual.sides import Terms
from fusechat.tiny.chats import World, generate
from fusechat.tiny.models import make_model, make_tokenizer

KINDS = {"server": "llama", "a": "gpt_neox", "b": "qwen2"}
CANARY = "the canary of {} sings zyxquov"


@dataclass(frozen=True)
class Small:
    """A folder with models and chats; the federation that they make."""

    root: Path

    def federation(self, folder: Path, method: str = "fedmkt", rounds: int = 1, **terms: object) -> Federation:
        """Of clients a and b, of different models; of one where adapters are averaged."""
        rule = FusionRule("dual_min_ce")
        chat = {"template": "native", "max_length": 128, "end_of_turn": True}
        agreed = Terms(
            str(self.root / "public.jsonl"),
            str(self.root / "server"),
            chat,
            rule,
            FusionLoss(lm_weight=0.5),
            extraction={"top_k": 4},
            optimizer=Optimizer(lr=1e-2),
            data=Data(global_batch=8, validation_fraction=0.0),
            callbacks=Callbacks(progress_bar=False),
            lora={"r": 2},
            trainer={"max_epochs": 1},
        )
        base = {"a": "a", "b": "a" if method in ("fedavg", "fedcollm") else "b"}
        clients = {
            name: Client(str(self.root / base[name]), str(self.root / f"private_{name}.jsonl")) for name in ("a", "b")
        }
        agreed = replace(agreed, **terms)  # type: ignore[arg-type]
        return Federation(method, str(self.root / "server"), clients, folder, agreed, rounds)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    root, world = tmp_path_factory.mktemp("mutual"), World(0)
    texts = [turn["content"] for row in generate(world, 300, "texts") for turn in row["messages"]]
    for name, kind in KINDS.items():
        torch.manual_seed(len(name))
        tokenizer = make_tokenizer(kind, 330, [*texts, *(CANARY.format(name) for name in KINDS)])
        make_model(kind, tokenizer, 16, 1, 2).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        rows = generate(world, 16, f"private {name}")
        turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": CANARY.format(name)}]
        write(root / f"private_{name}.jsonl", [*rows, {"messages": turns}])
    write(root / "public.jsonl", generate(world, 24, "public"))
    return Small(root)


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def ended(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """FedMKT's three rounds."""
    made = small.federation(tmp_path_factory.mktemp("fedmkt") / "out", rounds=3)
    mutual(made)
    return made


@pytest.fixture(scope="session")
def at_the_server(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """FedMKT's third round where the clients have sent and the server has not begun."""
    folder = tmp_path_factory.mktemp("third") / "out"
    mutual(small.federation(folder, rounds=2))
    made = small.federation(folder, rounds=3)
    for name in made.clients:
        made.part(name, 3)
    return made
