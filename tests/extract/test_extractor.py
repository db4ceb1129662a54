"""The extractor on its device: where the head runs, what is waited for, and that chunks and dtypes decide nothing."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from fusechat.chats.formats import load_chats
from fusechat.chats.render import ChatRenderer
from fusechat.extract import extractor as extracting
from fusechat.extract.extractor import Extractor
from fusechat.extract.kinds import KINDS, Keep
from fusechat.models.devices import fed_at
from fusechat.models.load import load_model
from fusechat.stores.encoding import decode_logprobs
from fusechat.stores.store import DistributionStore
from tests.conftest import Mini


@pytest.fixture(scope="module")
def rendered(mini: Mini) -> list[Any]:
    chats, _ = load_chats(str(mini.experiment / "world/chats/fusion.jsonl"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(mini.experiment / "world/models/a")
    return ChatRenderer(tokenizer)([row["messages"] for row in chats.select(range(6))])


@pytest.fixture
def model(mini: Mini) -> Any:
    return load_model(str(mini.experiment / "world/models/a")).eval()


class Calls(TorchDispatchMode):
    """Counts operations; ``waits`` are those for which a host must wait for its device."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.count += 1
        moved = name == "_to_copy" and (kwargs or {}).get("device") is not None
        self.waits += [name] if name in self.WAITS or moved else []
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_the_chunk_loop_never_waits_for_the_device(
    kind: str, model: Any, rendered: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk for each position asks for what one asks for."""
    extractor = Extractor(model, kind, Keep(500))
    found = []
    for chunk in (1 << 24, 1):
        monkeypatch.setattr(extracting, "ON_CPU", (chunk, chunk))
        with torch.inference_mode(), Calls() as calls:
            extractor._distributions(rendered)
        found.append(calls)
    assert found[1].count > found[0].count + 20, "there were more chunks"
    assert found[0].waits == found[1].waits


def test_the_head_runs_only_where_a_position_is_stored(model: Any, rendered: list[Any]) -> None:
    seen: list[int] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    Extractor(model, "top_k", Keep(500))(rendered)
    assert sum(seen) == sum(len(one.positions) for one in rendered)
    assert 0 < sum(seen) < sum(len(one.input_ids) for one in rendered)


def test_chunks_decide_nothing(model: Any, rendered: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Extractor(model, "top_k", Keep(500))(rendered)
    monkeypatch.setattr(extracting, "ON_CPU", (1 << 12, 1 << 11))
    for one, other in zip(whole, Extractor(model, "top_k", Keep(500))(rendered), strict=True):
        assert one is not None and other is not None
        assert torch.equal(one.ids, other.ids)
        assert torch.allclose(one.logprobs, other.logprobs, atol=1e-5)
        assert torch.allclose(one.gold_logprob, other.gold_logprob, atol=1e-5)


def test_only_the_chat_with_a_nan_is_dropped(model: Any, rendered: list[Any]) -> None:
    others = {token for i, one in enumerate(rendered) if i != 3 for token in one.input_ids.tolist()}
    token = next(token for token in rendered[3].input_ids.tolist() if token not in others)
    model.get_input_embeddings().weight.data[token] = float("nan")
    found = Extractor(model, "top_k", Keep(500))(rendered)
    assert [top is None for top in found] == [i == 3 for i in range(6)]


def test_the_run_has_the_dtype_of_its_fingerprint(fresh: Mini, rendered: list[Any]) -> None:
    """bfloat16 throughout, RoPE's frequencies in float32 as transformers loads them."""
    fresh.run("extract", "source=a", "source.dtype=bfloat16", "overwrite=true")
    store = DistributionStore(fresh.experiment / "distributions/a")
    path = fresh.experiment / "world/models/a"
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(b.dtype == torch.float32 for n, b in model.named_buffers() if "inv_freq" in n)
    for row in (0, 3):
        with torch.no_grad():
            logits = model(torch.from_numpy(rendered[row].input_ids)[None]).logits[0]
        wanted = logits[rendered[row].positions].float().log_softmax(-1).topk(10).values
        (stored,) = store.row(row, "logprobs")
        assert np.allclose(decode_logprobs(stored).reshape(-1, 10), wanted, atol=0.06)


@pytest.fixture
def offloaded(model: Any) -> Any:
    """A model whose weights lie on the meta device until they are used, as device_map=auto leaves them."""
    import accelerate

    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def test_an_offloaded_model_runs_where_accelerate_runs_it(offloaded: Any, mini: Mini, rendered: list[Any]) -> None:
    assert offloaded.get_output_embeddings().weight.device.type == "meta"
    assert fed_at(offloaded) == torch.device("cpu")
    plain = load_model(str(mini.experiment / "world/models/a")).eval()
    run = lambda model: Extractor(model, "top_k", Keep(500))(rendered)
    for one, other in zip(run(offloaded), run(plain), strict=True):
        assert one is not None and other is not None
        assert torch.equal(one.logprobs, other.logprobs)
