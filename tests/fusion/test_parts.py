"""Parts of a user's own by ``_target_``: callbacks, loggers, optimizers, schedules."""

import copy
import json
from pathlib import Path

import pytest
import torch

from fusechat.app.errors import UserError
from fusechat.app.needs import TARGETS
from fusechat.app.session import plain
from fusechat.fusion.optimizers import Muon, make_optimizer, make_schedule
from fusechat.fusion.options import Optimizer
from tests.conftest import Mini

MINE = """
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger


class Told(Callback):
    def __init__(self, file, every):
        self.file, self.every = file, every

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % self.every == 0:
            with open(self.file, "a") as file:
                file.write(f"{trainer.global_step} {len(trainer.callbacks)}\\n")
"""


def test_a_callback_and_a_logger_of_ones_own(fresh: Mini, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts_of_mine.py").write_text(MINE)
    callback = ["+callbacks.mine._target_=parts_of_mine.Told", f"+callbacks.mine.file={tmp_path}/told"]
    logger = ["+logger.mine._target_=parts_of_mine.CSVLogger", f"+logger.mine.save_dir={tmp_path}/mine"]
    options = ["source=a", "trainer.max_steps=4", "logger=none", "trainer.log_every_n_steps=1", *callback, *logger]
    fresh.run("train", *options, "+callbacks.mine.every=2", "optimizer=muon")
    assert [line.split()[0] for line in (tmp_path / "told").read_text().splitlines()] == ["2", "4"]
    (logged,) = tmp_path.glob("mine/**/metrics.csv")
    assert "train/loss" in logged.read_text().splitlines()[0]
    assert not [*fresh.experiment.rglob("logs/train-a")], "logger=none: no other"
    record = json.loads((fresh.experiment / "targets/a/fusechat.json").read_text())
    told = {key: value for key, value in record["decided_by"].items() if "mine" in key or key.startswith("optimizer")}
    assert told["callbacks.mine.every"] == 2 and "imports.parts_of_mine" in told
    assert told["optimizer._target_"] == "fusechat.fusion.optimizers.Muon" and told["optimizer.momentum"] == 0.95
    assert not any(key.startswith("logger") for key in record["decided_by"])
    with pytest.raises(UserError, match=r"callbacks\.mine\.every: 2 there, 3 now\); add overwrite=true"):
        fresh.run("train", *options, "+callbacks.mine.every=3", "optimizer=muon")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["+trainer.callbacks=[x]"],
            r"no key 'trainer\.callbacks'; a callback of your own is \+callbacks\.NAME\._target",
        ),
        (
            ["+trainer.logger=x"],
            r"no key 'trainer\.logger'; a logger of your own is \+logger\.NAME\._target_=module\.Class",
        ),
        (["+callbacks.mine.every=2"], r"no key 'callbacks\.mine'"),
        (["+callbacks.mine._target_=nowhere.Mine"], r"'nowhere' cannot be imported from .*No module named 'nowhere'"),
        (
            ["+optimizer._target_=torch.optim.SGD"],
            r"optimizer\._target_: .*unexpected keyword argument 'betas'; '~optimizer\.KEY'",
        ),
        (["+optimizer._target_=torch.optim.Sgd"], r"optimizer\._target_=torch\.optim\.Sgd cannot be imported"),
        (["optimizer.schedule=flat"], r"optimizer\.schedule='flat' is unknown; use one of: linear, cosine"),
        (["+callbacks.mine._target_=lightning.pytorch.callbacks.EarlyStopping"], r"callbacks\.mine: .*monitor"),
    ],
    ids=lambda o: o[0] if isinstance(o, list) else "",
)
def test_mistakes(overrides: list[str], message: str, mini: Mini) -> None:
    with pytest.raises(UserError, match=message):
        mini.run("train", "source=a", "run_name=mistaken", *overrides)


@pytest.mark.parametrize(("logger", "package"), [("mlflow", "mlflow"), ("tensorboard", "tensorboard")])
def test_a_logger_by_name_says_what_to_install(
    logger: str, package: str, mini: Mini, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    with pytest.raises(
        UserError, match=rf"logger\.{logger}\._target_=.* needs {package}: pip install 'fusechat\[{package}\]'"
    ):
        mini.run("train", "source=a", f"logger={logger}")
    cfg = mini.cfg("train", "source=a", f"logger={logger}")
    assert cfg.logger[logger]["_target_"] in TARGETS and cfg.logger.kind == "csv"


def test_mlflow_writes_a_database_beside_the_metrics(mini: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 3.17 on it refuses folders of files, which Lightning's logger takes where no place is named."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    cfg = mini.cfg("train", "source=a", "logger=mlflow")
    assert cfg.logger.mlflow.tracking_uri == f"sqlite:///{cfg.paths.logs}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    assert mini.cfg("train", "source=a", "logger=mlflow").logger.mlflow.tracking_uri == "http://elsewhere"


def test_the_default_is_adamw_with_the_fingerprint_it_has_always_had(mini: Mini) -> None:
    said = plain(mini.cfg("train").optimizer)
    assert Optimizer.of(said).settings == said
    assert [*said] == ["lr", "betas", "weight_decay", "warmup_ratio", "schedule"]


def model() -> torch.nn.Sequential:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))


def names(net: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """As a language model has them: numbered blocks after the embedding."""
    return [("embed.weight" if n == "0.weight" else f"layers.{n}", p) for n, p in net.named_parameters()]


def stepped(net: torch.nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 3) -> list[torch.Tensor]:
    for step in range(steps):
        net.zero_grad()
        net(torch.arange(7).roll(step)).pow(2).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def test_muon_is_torchs_for_matrices_of_blocks_and_adamw_for_the_rest() -> None:
    one, two = model(), model()
    settings = Optimizer(
        lr=0.02, target="fusechat.fusion.optimizers.Muon", options={"weight_decay": 0.1, "momentum": 0.9}
    )
    found = stepped(one, make_optimizer(settings, names(one)))
    matrices = [p for n, p in two.named_parameters() if n in ("1.weight", "2.weight")]
    others = [p for n, p in two.named_parameters() if n not in ("1.weight", "2.weight")]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    expected = stepped(two, muon, torch.optim.AdamW(others, lr=0.02, weight_decay=0.1))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_muon_goes_on_bit_for_bit_and_obeys_a_schedule() -> None:
    whole, first = model(), model()
    expected = stepped(whole, Muon(names(whole), lr=0.02), steps=4)
    before = Muon(names(first), lr=0.02)
    stepped(first, before, steps=2)
    later = copy.deepcopy(first)
    after = Muon(names(later), lr=1.0)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for step in (2, 3):
        later.zero_grad()
        later(torch.arange(7).roll(step)).pow(2).sum().backward()
        after.step()
    assert all(torch.equal(*pair) for pair in zip(expected, later.parameters(), strict=True))
    schedule = make_schedule(Optimizer(schedule="constant_with_warmup", warmup_ratio=0.5), after, 8)
    assert [group["lr"] for part in after.parts for group in part.param_groups] == schedule.get_last_lr() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("target", "options", "rates"),
    [
        ("torch.optim.lr_scheduler.LinearLR", {"start_factor": 0.5, "total_iters": 2}, [0.5, 0.75, 1.0]),
        ("transformers.get_linear_schedule_with_warmup", {}, [0.0, 0.5, 1.0, 0.5, 0.0]),
        ("torch.optim.lr_scheduler.OneCycleLR", {"max_lr": 1.0, "pct_start": 0.5, "anneal_strategy": "linear"}, [0.04]),
    ],
)
def test_schedules_of_ones_own(target: str, options: dict[str, object], rates: list[float]) -> None:
    """Those that want the number of steps get it: four, two of them warm-up."""
    net = model()
    chosen = Optimizer(lr=1.0, warmup_ratio=0.5, schedule={"_target_": target, **options})
    optimizer = make_optimizer(chosen, names(net))
    schedule, found = make_schedule(chosen, optimizer, 4), []
    for _ in rates:
        found += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(rates)
