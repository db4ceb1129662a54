"""Extraction from a server of the miniature world's models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusechat.stores.store import DistributionStore
from tests.conftest import Mini
from tests.stores.served.servers import Answer, LlamaCpp, Server

SMALL = ["chat.limit=12", "extract.rows_per_shard=4", "source.wait=0.01"]
Serve = Callable[..., Any]


def run(mini: Mini, server: Server, output: Path, *overrides: str, name: str = "a") -> DistributionStore:
    engine = "text_server" if isinstance(server, LlamaCpp) else "server"
    asked = [f"source.engine={engine}", f"source.base_url={server.url}", "source.model=big", f"output_dir={output}"]
    mini.run("extract", f"source={name}", *SMALL, *asked, *overrides)
    return DistributionStore(output)


def changed(**values: Any) -> Callable[[Answer], Answer]:
    return lambda answer: answer | {"choices": [answer["choices"][0] | values]}


def with_rows(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Answer], Answer]:
    """Changes what is listed at every place."""

    def spoil(answer: Answer) -> Answer:
        rows = answer["choices"][0]["prompt_logprobs"]
        return changed(prompt_logprobs=[None, *map(change, rows[1:])])(answer)

    return spoil


def every(entry: dict[str, Any]) -> Callable[[Answer], Answer]:
    return with_rows(lambda row: {token: old | entry for token, old in row.items()})
