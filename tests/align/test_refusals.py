"""What the alignment refuses: unknown settings, and stores that do not belong together."""

import json
from pathlib import Path

import pytest

from fusechat.app.errors import UserError
from tests.conftest import Mini
from tests.spoiling import replaced, spoil


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["token_map.name=best"], r"token_map\.name='best' is unknown; use one of: em, hybrid, mined, ms, prefix, uld"),
        (["alignment.sequence=best"], r"alignment\.sequence='best' is unknown; use one of: chain, dtw, offsets"),
        (["alignment.unmatched=best"], r"alignment\.unmatched='best' is unknown; use one of: gold, skip"),
        (["store.logprobs=best"], r"store\.logprobs='best' is unknown; use one of: float16, uint8"),
        (
            ["source.name=zz"],
            r"distributions/zz does not exist; make it with: python -m fusechat\.extract experiment=tiny source=zz",
        ),
        (
            ["token_map=em"],
            r"aligned/a holds a store made with other settings \(token_map: \"prefix\" there, \"em\" now\); add overwrite=true",
        ),
    ],
)
def test_bad_settings(overrides: list[str], message: str, mini: Mini) -> None:
    with pytest.raises(UserError, match=message):
        mini.run("align", "source=a", *overrides)


def test_stores_over_different_chats_are_refused(fresh: Mini) -> None:
    fresh.run("extract", "source=a", "chat.limit=50", "overwrite=true")
    with pytest.raises(
        UserError, match=r"\(50 chats\) and .* \(96\) hold different chats; extract both with the same chat\.path"
    ):
        fresh.run("align", "source=a", "overwrite=true")


def test_texts_that_differ_after_rendering_are_told_with_excerpts(fresh: Mini) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] | replace('a b', 'a  b') }}<|endoftext|>{% endfor %}"
    )
    rows = [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " padded a c"}]}
        for _ in range(4)
    ]
    chats = Path(fresh.root) / "padded.jsonl"
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stripped = template.replace("replace('a b', 'a  b')", "trim")
    fresh.run("extract", "source=pivot", f"chat.path={chats}", "overwrite=true")
    fresh.run(
        "extract",
        "source=a",
        f"chat.path={chats}",
        f"chat.template='{stripped.replace(chr(39), chr(92) + chr(39))}'",
        "overwrite=true",
    )
    with pytest.raises(
        UserError,
        match=r"4 chats read differently after rendering; the first is row 0, character \d+: .* / .* \(pivot / source\)",
    ):
        fresh.run("align", "source=a", "overwrite=true")


def test_ids_beyond_the_tokenizer_are_refused(fresh: Mini) -> None:
    spoil(fresh.experiment / "distributions/a", lambda table: replaced(table, "ids", 65_000))
    with pytest.raises(
        UserError,
        match=r"distributions/a, row \d+: token id 65000 is beyond the tokenizer's \d+ tokens; give the tokenizer",
    ):
        fresh.run("align", "source=a", "overwrite=true", "token_map=em")
