"""What a long work says of itself: lines where nobody sees a bar, a bar in a terminal, and nothing of libraries."""

import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fusechat.app import progress as module
from fusechat.app.locks import held, note, noted
from fusechat.app.progress import progress, spell
from fusechat.app.states import state_of
from tests.conftest import ROOT, Mini


class Clock:
    """A clock that moves when it is told to."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


def test_a_line_at_most_every_half_minute(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, module.__name__)
    asked = []
    with progress("extract", 1000, "chats", 400) as tell:
        for _ in range(100):
            clock.now += 1
            tell(2, lambda: asked.append(1) or "7 tokens/s")
    assert [record.message for record in caplog.records] == [
        "extract: 460 of 1,000 chats (46 %), 2.0 chats/s, 7 tokens/s, 4 min 30 s left",
        "extract: 520 of 1,000 chats (52 %), 2.0 chats/s, 7 tokens/s, 4 min 0 s left",
        "extract: 580 of 1,000 chats (58 %), 2.0 chats/s, 7 tokens/s, 3 min 30 s left",
    ]
    assert len(asked) == 3, "what it costs to know is asked for when it is shown"


def test_status_reads_how_far_a_work_is(clock: Clock, tmp_path: Path) -> None:
    """Noted every few seconds beside the lock, with a bar or without, and gone when the output is let go."""
    output, other = tmp_path / "targets/a", tmp_path / "targets/b"
    note = output.with_name(".a.progress")
    with held(other), held(output), progress("train a", 300, "steps", 100) as tell:
        tell(2)
        assert noted(output) == "", "not before there is a rate"
        clock.now += 5
        tell(8)
        said = r"110 of 300 steps \(37 %\), 2\.0 steps/s, 1 min 35 s left \(at \d\d:\d\d:\d\d\)"
        assert re.fullmatch(said, noted(output)) and noted(other) == "", "the output that was taken last"
        (told,) = [state_of(output).told]
        assert re.fullmatch(rf"{said}; host \S+, pid {os.getpid()}, since [-\d]+ [:\d]+", told)
        clock.now += 4
        tell(10)
        assert note.read_text().startswith("110 of")
    assert not note.exists()


def test_a_killed_process_note_is_not_the_next_ones(tmp_path: Path) -> None:
    tmp_path.joinpath(".a.progress").write_text("1 of 2 steps")
    with held(tmp_path / "a"):
        assert noted(tmp_path / "a") == ""
    note("nothing is held, nothing is written")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")]
)
def test_times_in_words(seconds: float, text: str) -> None:
    assert spell(seconds) == text


def test_a_bar_in_a_terminal_and_lines_above_it() -> None:
    program = (
        "import logging, sys, time; from fusechat.app.progress import progress\n"
        "logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
        "with progress('merge', 4, 'parameters') as tell:\n"
        "    for i in range(4): time.sleep(0.3); tell(1, lambda: 'fast'); logging.info('at %d', i)\n"
        "logging.info('done')"
    )
    above, below = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stderr=below,
        stdout=below,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    ) as process:
        os.close(below)
        shown = b""
        while part := read(above):
            shown += part
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert process.returncode == 0
    assert re.search(r"merge .*/4 .*parameters/s, fast", text)
    assert [line.strip() for line in text.replace("\r", "\n").splitlines() if line.startswith(("at ", "done"))] == [
        "at 0",
        "at 1",
        "at 2",
        "at 3",
        "done",
    ]


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # its other end is closed
        return b""


def test_a_stage_without_a_terminal_says_only_what_is_ours(fresh: Mini) -> None:
    """Under wandb_offline, which used to warn; bars of transformers and datasets; Lightning's hints."""
    options = [
        "source=a",
        "trainer.max_steps=2",
        "logger=wandb_offline",
        "overwrite=true",
        "callbacks.progress_bar=true",
    ]
    done = subprocess.run(
        [sys.executable, "train.py", *fresh.base, *options], cwd=ROOT, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert all(re.match(r"\[\S+ \S+\]\[fusechat\.[\w.]+\]\[INFO\] - ", line) for line in lines), done.stderr
    closing = (
        r"target a: 2 steps, \d+ tokens at [\d,]+ a second; SFT loss .* held-out bits per byte \d\.\d{4}; in .* s, /"
    )
    assert re.search(closing, lines[-1])


def test_libraries_draw_no_bars_without_a_terminal() -> None:
    """Transformers unpacks GGUF files under a bar that none of its settings turns off."""
    code = "from fusechat.app.session import session\nwith session():\n from tqdm.auto import tqdm; [*tqdm([1, 2])]"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_training_tells_loss_and_rate(
    fresh: Mini, clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, module.__name__)
    monkeypatch.setattr(module, "LINES", 0.0)
    fresh.run("train", "source=a", "trainer.max_steps=2", "validation.path=null", "trainer.log_every_n_steps=1")
    told = [record.message for record in caplog.records if record.name == module.__name__]
    assert len(told) == 2
    assert re.match(
        r"train a: 1 of 2 steps \(50 %\), .* steps/s, sft \d\.\d{3}, fusion \d\.\d{3}, [\d,]+ tokens/s, ", told[0]
    )


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def test_what_matters_is_loud(fresh: Mini, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh.run("extract", "source=b", "chat.max_length=14", "overwrite=true")
    (cut,) = warnings(caplog)
    assert re.match(
        r"\d+ of 96 chats \(\d+ %\) are longer than chat\.max_length=14 tokens of b and were cut; raise it", cut
    )
    caplog.clear()
    fresh.run("align", "source=b", "overwrite=true")
    (few,) = warnings(caplog)
    assert re.match(r"only \d+ % of the pivot's positions have a distribution of b: the others teach nothing", few)


def test_a_source_that_never_wins_is_told(fresh: Mini, caplog: pytest.LogCaptureFixture) -> None:
    from fusechat.fusion.callbacks import FusionShares
    from fusechat.fusion.wins import Wins

    class Module:
        names = ["pivot", "a", "b"]
        wins = Wins(names, pivot_else=False)

    Module.wins.restore([["all", "pivot", 8], ["all", "a", 2]])

    class Trainer:
        loggers: list[Any] = []

    told = FusionShares()
    for _ in range(2):
        told.on_train_epoch_end(Trainer(), Module())  # type: ignore[arg-type]
    (lost,) = warnings(caplog)
    assert lost.startswith("source b spoke for 0.00 % of the response tokens: the pivot alone is likelier")
