"""Rendering: exactly the assistants' text is masked, for any template; chat files in every format, and bad ones."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusechat.app import checksums
from fusechat.app.errors import UserError
from fusechat.app.registry import choices
from fusechat.chats.formats import FORMATS, chat_id, in_validation, load_chats
from fusechat.chats.render import ChatRenderer, Rendered
from tests.conftest import Mini, composed

EXTRA = {
    "llama2": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }} {{ eos_token }}{% else %}<<SYS>>{{ m['content'] }}<</SYS>>{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m['role'] }}:{{ m['content'] }}\n{% endif %}{% endfor %}",
    "system-in-user": "{% for m in messages %}{% if m['role'] == 'system' %}{% else %}{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] }}\n\n{% endif %}{{ m['role'] }}> {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
}
NAMES = ("pivot", "a", "b", "c")


def render_chat(chat: Any, tokenizer: Any, **options: Any) -> Rendered:
    return ChatRenderer(tokenizer, **options)([chat])[0]


CONTENT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Co", "Cc")), max_size=12) | st.sampled_from(
    ["assistant", "A:", "user> x", "naïve café", "日本語 🙂 é", "1234", "a\nb", "", " padded ", "</s>", "<|end|>"]
)
TURNS = st.lists(st.sampled_from(["user", "assistant", "tool"]), min_size=1, max_size=5)


@st.composite
def conversations(draw: Any) -> list[dict[str, str]]:
    roles = (["system"] if draw(st.booleans()) else []) + draw(TURNS)
    return [{"role": role, "content": draw(CONTENT)} for role in roles]


def masked_text(rendered: Any, tokenizer: Any) -> str:
    return tokenizer.decode(
        [i for i, keep in zip(rendered.input_ids, rendered.assistant_mask, strict=True) if keep],
        skip_special_tokens=True,
    )


@settings(
    deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(conversations(), st.sampled_from(NAMES), st.sampled_from([None, *EXTRA]))
def test_masked_characters_are_the_assistants(
    tokenizers: Callable[[str], Any], chat: list[dict[str, str]], name: str, template: str | None
) -> None:
    tokenizer = tokenizers(name)
    renderer = ChatRenderer(tokenizer, template=EXTRA[template] if template else "native", end_of_turn=False)
    rendered = renderer([chat])[0]
    spans = [(a, b) for i, a, b in renderer.content_spans(chat, rendered.text) if chat[i]["role"] == "assistant"]
    contents = [m["content"] for m in chat if m["role"] == "assistant"]
    texts = [rendered.text[a:b] for a, b in spans]
    assert [t.strip() for t in texts] == [c.strip() for c in contents]
    for (start, end), keep in zip(rendered.char_spans, rendered.assistant_mask, strict=True):
        touches = any(start < b and end > a for a, b in spans)
        if start < end:
            assert keep == touches or (keep and any(a <= end <= b for a, b in spans)), (rendered.text[start:end], keep)
    unpredicted = rendered.char_spans[0, 1]  # nothing predicts the first token of a text
    if rendered.assistant_mask[0] and len(rendered.boundaries) and rendered.boundaries[0] == -1:
        unpredicted = rendered.char_spans[1, 1]  # it ends inside a character, which the second token ends
    predicted = sum(len(rendered.text[max(a, unpredicted) : b].encode()) for a, b in spans)
    assert rendered.n_bytes == predicted


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(conversations(), st.sampled_from(NAMES))
def test_without_offsets_the_same_tokens_are_found(
    tokenizers: Callable[[str], Any], chat: list[dict[str, str]], name: str
) -> None:
    renderer = ChatRenderer(tokenizers(name))
    wanted = renderer([chat])[0]
    found = renderer._without_offsets(chat, wanted.text)
    assert found.input_ids.tolist() == wanted.input_ids.tolist()
    assert found.assistant_mask.tolist() == wanted.assistant_mask.tolist()
    assert (found.n_bytes, found.text_hash) == (wanted.n_bytes, wanted.text_hash)
    assert set(found.boundaries[found.boundaries >= 0]) <= set(wanted.boundaries), "only where turns begin and end"


def test_a_cut_without_offsets_counts_the_kept_bytes(tokenizers: Callable[[str], Any]) -> None:
    chat = [{"role": "user", "content": "Sort b a."}, {"role": "assistant", "content": "a b c d e f g h"}]
    length = len(ChatRenderer(tokenizers("a"))([chat])[0].input_ids) - 6
    renderer = ChatRenderer(tokenizers("a"), max_length=length)
    wanted = renderer([chat])[0]
    found = renderer._without_offsets(chat, wanted.text)
    assert found.truncated
    assert found.n_bytes == wanted.n_bytes < 15


@pytest.mark.parametrize("name", NAMES)
def test_end_of_turn_is_trained_on_where_configured(name: str, tokenizers: Callable[[str], Any]) -> None:
    tokenizer = tokenizers(name)
    chat = [{"role": "user", "content": "Sort b a."}, {"role": "assistant", "content": "a b"}] * 2
    with_end, without = (render_chat(chat, tokenizer, end_of_turn=flag) for flag in (True, False))
    closing = (with_end.assistant_mask & ~without.assistant_mask).nonzero()[0]
    assert with_end.input_ids[closing].tolist() == [tokenizer.eos_token_id] * 2
    assert with_end.boundaries.max() == 7  # two turns of three bytes, one byte apart, each closed
    assert (with_end.end, without.end) == (8, 8)
    assert masked_text(without, tokenizer).replace(" ", "") == "abab"


@pytest.mark.parametrize("name", NAMES)
def test_boundaries_count_assistant_bytes(name: str, tokenizers: Callable[[str], Any]) -> None:
    rendered = render_chat(
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a bé 🙂 c"}], tokenizers(name)
    )
    inside = rendered.boundaries[rendered.boundaries >= 0]
    assert inside[0] == 0
    assert inside[-1] == len("a bé 🙂 c".encode())
    assert (inside[1:] > inside[:-1]).all()


def test_truncation_cuts_at_a_token_and_is_told(tokenizers: Callable[[str], Any]) -> None:
    chat = [{"role": "user", "content": "Sort b a."}, {"role": "assistant", "content": "a b c d e f g h"}]
    whole, cut = render_chat(chat, tokenizers("pivot")), render_chat(chat, tokenizers("pivot"), max_length=12)
    assert (whole.truncated, cut.truncated, len(cut.input_ids)) == (False, True, 12)
    assert cut.input_ids.tolist() == whole.input_ids[:12].tolist()
    assert cut.n_bytes < whole.n_bytes


def test_batches_equal_single_chats(tokenizers: Callable[[str], Any]) -> None:
    chats = [[{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "y " * n}] for n in (1, 5, 2)]
    renderer = ChatRenderer(tokenizers("b"))
    for one, many in zip([renderer([c])[0] for c in chats], renderer(chats), strict=True):
        assert one.input_ids.tolist() == many.input_ids.tolist()
        assert one.boundaries.tolist() == many.boundaries.tolist()


def test_template_errors(tokenizers: Callable[[str], Any]) -> None:
    tokenizer, chat = (
        tokenizers("pivot"),
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "answer"}],
    )
    with pytest.raises(UserError, match=r"the chat template of .* fails: no.*see chat\.template"):
        render_chat(chat, tokenizer, template="{{ raise_exception('no') }}")
    with pytest.raises(UserError, match=r"rewrites message 1 \(assistant: 'answer'\)"):
        render_chat(chat, tokenizer, template="{% for m in messages %}{{ m['content'] | upper }};{% endfor %}")
    with pytest.raises(UserError, match="prints a message twice"):
        render_chat(chat, tokenizer, template="{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"has no chat template; give one with chat\.template="):
        render_chat(chat, tokenizer)


QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}
ROWS = {
    "messages": {"messages": [QUESTION, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]},
    "alpaca": {"instruction": "q", "input": "", "output": "r"},
    "prompt_response": {"prompt": "q", "response": "r"},
    "text": {"text": "r"},
}


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_read(name: str, suffix: str, forced: bool, tmp_path: Path) -> None:
    file = tmp_path / f"chats.{suffix}"
    data = datasets.Dataset.from_list([ROWS[name], ROWS[name]])
    data.to_parquet(file) if suffix == "parquet" else data.to_json(file)
    chats, found = load_chats(file, format=name if forced else None)
    assert found == name
    assert chats["messages"][:] == [[ANSWER] if name == "text" else [QUESTION, ANSWER]] * 2
    assert chats[0]["id"] == chat_id(chats[0]["messages"])
    assert load_chats(data, format=name)[0].to_list() == chats.to_list()
    assert load_chats(chats)[0] is chats


def test_the_groups_files_are_the_formats() -> None:
    assert choices("chat.format") == {name: member.help for name, member in FORMATS.items()}


@pytest.mark.parametrize("override", ["format=alpaca", "chat.format=alpaca"])
def test_two_ways_to_name_a_format(override: str) -> None:
    assert composed("extract", ["experiment=tiny", override]).chat.format == "alpaca"
    assert composed("extract", ["experiment=tiny"]).chat.format is None


def test_a_format_that_does_not_fit_or_is_unknown() -> None:
    both = datasets.Dataset.from_list([{"prompt": "q", "response": "r", "text": "t"}])
    assert load_chats(both)[1] == "prompt_response"
    assert load_chats(both, format="text")[0]["messages"][0] == [{"role": "assistant", "content": "t"}]
    with pytest.raises(
        UserError,
        match=r"^the dataset has the columns prompt, response, text; chat\.format=alpaca needs instruction, output too; "
        r"chat\.format=null finds the format by its columns$",
    ):
        load_chats(both, format="alpaca")
    with pytest.raises(UserError, match=r"^chat\.format='chatml' is unknown; use one of: alpaca, messages, "):
        load_chats(both, format="chatml")


MINE = """
from fusechat.chats.formats import FORMATS

@FORMATS.register("mine", "riddle and solution", needs=("riddle", "solution"))
def mine(row):
    if not row["riddle"]:
        raise ValueError("a riddle is empty")
    return [{"role": "user", "content": row["riddle"]}, {"role": "assistant", "content": row["solution"]}]
"""


def test_a_format_of_ones_own(mini: Mini, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusechat.stores.store import DistributionStore

    (tmp_path / "my_riddles.py").write_text(MINE)
    (tmp_path / "c.jsonl").write_text('{"riddle": "q", "solution": "r"}\n')
    (tmp_path / "bad.jsonl").write_text('{"riddle": "", "solution": "r"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(FORMATS, "_members", dict(FORMATS._members))
    command = ["source=a", "imports=[my_riddles]", f"chat.path={tmp_path}/c.jsonl", f"output_dir={tmp_path}/out"]
    mini.run("extract", *command, "chat.format=mine")
    assert DistributionStore(tmp_path / "out").column("id").tolist() == [chat_id([QUESTION, ANSWER])]
    assert load_chats(tmp_path / "c.jsonl")[1] == "mine", "found by its columns too"
    with pytest.raises(UserError, match=r"bad\.jsonl, chat 0: a riddle is empty$"):
        load_chats(tmp_path / "bad.jsonl", format="mine")
    (tmp_path / "my_riddles.py").write_text(MINE + "# another\n")
    with pytest.raises(UserError, match=r"made with other settings \(imports\.my_riddles: "):
        mini.run("extract", *command, "chat.format=mine")


def written(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "x.jsonl",
            '{"prompt": "a", "response": "b"}\n{"prompt": \n',
            r"x\.jsonl, line 2: not JSON .*mend or remove the line",
        ),
        ("x.jsonl", "", r"x\.jsonl is empty; see chat\.path"),
        ("x.jsonl", '{"question": "a"}\n', r"has the columns question; expected one of messages: messages; sharegpt"),
        (
            "x.jsonl",
            '{"messages": [{"role": "alien", "content": "b"}]}\n',
            "chat 0: unknown role or key 'alien'; roles are human",
        ),
        ("x.jsonl", '{"messages": []}\n', "chat 0: no messages|is not a role"),
        (
            "x.jsonl",
            '{"messages": [{"role": "user", "content": "b", "tool_calls": [{"id": 1}]}]}\n',
            "chat 0: unknown role or key 'name'",
        ),
        (
            "x.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "image", "text": ""}]}]}\n',
            "its content is a list of more than text",
        ),
        ("x.txt", "hello", "is not a chat file; expected .json"),
    ],
)
def test_bad_files(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_chats(written(tmp_path / name, text))


TURN = '{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}'
CHAT = f'{{"messages": [{TURN}]}}'
TWICE = CHAT.replace('"role": "user"', '"role": "user", "role": "user"')
HALF = CHAT.replace('"q"', '"\\ud800"')


@pytest.mark.parametrize("form", ["{0}", "{1}\n\n{0}\n", "[{0}]", "[{1},\n{0}]"])
@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        (TWICE, r"not JSON \(the key 'role' twice, with 'user' and 'user'\); mend or remove"),
        (HALF, r"not JSON \(\\ud800 is half a character\); mend or remove"),
    ],
)
def test_json_that_libraries_read_differently(form: str, chat: str, reason: str, tmp_path: Path) -> None:
    place = {"{0}": ", line 1", "{1}\n\n{0}\n": ", line 3"}.get(form, "")
    with pytest.raises(UserError, match=rf"x\.json{place}: {reason}"):
        load_chats(written(tmp_path / "x.json", form.format(chat, CHAT)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n \n", r"x\.jsonl holds no chats; see chat\.path"),
        ("5\nnull\n", r"x\.jsonl, chat 0: expected an object \{\.\.\}, found 5; see chat\.path"),
        (f"[{CHAT}, null]", r"x\.jsonl, chat 1: expected an object \{\.\.\}, found None"),
        (f"[[{CHAT}]]", r"chat 0: expected an object \{\.\.\}, found \[\{'messages'"),
        ('{"messages": "hello"}', r"chat 0: .* \(messages is 'hello', no list of objects\)$"),
        (CHAT + '\n{"messages": null}', r"chat 1: .* \(messages is None, no list of objects\)$"),
        ('{"conversations": {"from": "gpt"}}', r"\(conversations is \{'from': 'gpt'\}, no list of objects\)$"),
        ('{"instruction": 5, "output": "a"}', r"\(its content is 5\)$"),
        ('{"instruction": "q", "output": 7}', r"\(its content is 7\)$"),
        (CHAT.replace('"q"', '[{"type": "text", "text": 5}]'), r"\(its content is a list of more than text\)$"),
        (CHAT.replace('"a"', '"a", "reasoning_content": "hm"'), "reasoning_content would be lost"),
    ],
)
def test_rows_of_other_forms(text: str, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=message):
        load_chats(written(tmp_path / "x.jsonl", text))
    assert not caplog.text, "told once"


def test_one_object_may_take_several_lines(tmp_path: Path) -> None:
    pretty = CHAT.replace(", ", ",\n ")
    assert len(load_chats(written(tmp_path / "x.json", pretty))[0]) == 1
    with pytest.raises(UserError, match=r"x\.json: not JSON \(the key 'content' twice"):
        load_chats(written(tmp_path / "y" / "x.json", pretty.replace('"q"', '"q",\n "content": "q"')))


def test_folders_of_files(tmp_path: Path) -> None:
    """Any name, hidden files passed over; other kinds, folders named like files, and links to nothing are told."""
    folder = tmp_path / "ünï 'q\" [1] *?{a}"
    (folder / "inner.jsonl").mkdir(parents=True)
    written(folder / "a b.jsonl", CHAT)
    written(folder / "._a.jsonl", "not JSON")
    written(folder / ".cache/b.jsonl", "not JSON")
    for place in (folder, folder / "a b.jsonl", f"{folder}/"):
        assert len(load_chats(place)[0]) == 1
    (folder / "z.jsonl").symlink_to("/nowhere")
    with pytest.raises(UserError, match=r"z\.jsonl is a link to nothing; mend or remove it"):
        load_chats(folder)
    (folder / "z.jsonl").unlink()
    written(folder / "b.parquet", "")
    with pytest.raises(UserError, match=r"holds files of several kinds \(a b\.jsonl and b\.parquet\); give one"):
        load_chats(folder)


def test_saved_datasets_are_read_and_damage_is_found(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list([{"text": "t"}])
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=saved).save_to_disk(str(tmp_path / "several"))
    for name in ("one", "several"):
        before = sorted((tmp_path / name).rglob("*"))
        chats, found = load_chats(tmp_path / name)
        assert (found, chats[0]["messages"]) == ("text", [{"role": "assistant", "content": "t"}])
        assert sorted((tmp_path / name).rglob("*")) == before, "nothing is written into it"
    (file,) = (tmp_path / "several/train").glob("*.arrow")
    status = file.stat()
    data = bytearray(file.read_bytes())
    data[data.index(b"t", len(data) // 2)] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    checksums.forget()
    with pytest.raises(UserError, match=r"\.arrow is damaged"):
        load_chats(tmp_path / "several")
    for state, message in (
        ("{}", r"state\.json is not what datasets writes \('_data_files'\); save the dataset again"),
        ("{", r"state\.json is not what datasets writes \("),
        ('{"_data_files": [{"filename": "x.arrow"}]}', r"x\.arrow is missing; save the dataset again"),
    ):
        with pytest.raises(UserError, match=message):
            load_chats(written(tmp_path / "bad/state.json", state).removesuffix("/state.json"))


def test_text_parts_are_joined(tmp_path: Path) -> None:
    parts = (
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]}'
        ', {"role": "assistant", "content": "a"}]}\n'
    )
    chats, _ = load_chats(written(tmp_path / "x.jsonl", parts))
    assert chats[0]["messages"][0] == {"role": "user", "content": "qr"}


def test_streams_are_read_to_their_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(f'{{"prompt": "q{i}", "response": "r"}}\n' for i in range(9))
    stream = datasets.load_dataset(
        "json", data_files=written(tmp_path / "x.jsonl", lines), split="train", streaming=True
    )
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: asked.append((a, o)) or stream)
    chats, found = load_chats("owner/name", split="test", name="en", limit=4, streaming=True)
    assert (found, [chat["messages"][0]["content"] for chat in chats]) == ("prompt_response", ["q0", "q1", "q2", "q3"])
    assert asked == [(("owner/name", "en"), {"split": "test", "streaming": True})]


def test_a_hub_dataset_that_cannot_be_read() -> None:
    with pytest.raises(
        UserError, match=r"chat\.path=owner/name is neither a file here nor a dataset on the Hub that could be read"
    ):
        load_chats("owner/name")


def test_missing_file() -> None:
    with pytest.raises(UserError, match=r"chat\.path=/nowhere\.jsonl does not exist"):
        load_chats("/nowhere.jsonl")


def test_validation_split_is_by_content() -> None:
    held = [i for i in range(4000) if in_validation(f"{i:x}", 0.1, 0)]
    assert 300 < len(held) < 500
    assert held == [i for i in range(4000) if in_validation(f"{i:x}", 0.1, 0)]
    assert held != [i for i in range(4000) if in_validation(f"{i:x}", 0.1, 1)]
