"""A fixture that makes servers."""

from collections.abc import Iterator

import pytest
from transformers import AutoTokenizer

from tests.conftest import Mini
from tests.extract.served import Serve
from tests.stores.served.servers import Logits, Server, of_model


@pytest.fixture
def serving(mini: Mini) -> Iterator[Serve]:
    """Makes servers of the miniature world's models, or of other logits."""
    made: list[Server] = []

    def serve(kind: type[Server], name: str, logits: Logits | None = None) -> Server:
        path = mini.experiment / "world/models" / name
        made.append(kind(AutoTokenizer.from_pretrained(path), logits or of_model(path)))
        return made[-1]

    yield serve
    for server in made:
        server.server.shutdown()
