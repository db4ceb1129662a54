"""System, tool and several turns: from the formats people have, through templates that know them and some that do not."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusechat.app.errors import UserError
from fusechat.chats.formats import load_chats
from fusechat.chats.render import ChatRenderer
from fusechat.chats.roles import in_two_roles
from fusechat.stores.store import DistributionStore
from tests.conftest import Mini

NAMES = ("pivot", "a", "b", "c")
STRICT = (  # as Gemma's and Mistral's: no system, no tool, turns that alternate
    "{{ bos_token }}{% for m in messages %}{% if m['role'] not in ['user', 'assistant'] %}{{ raise_exception('no ' + m['role']) }}"
    "{% elif (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% else %}[{{ m['role'] }}] {{ m['content'] | trim }}{{ eos_token }}\n{% endif %}{% endfor %}"
)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": CALL},
    {"role": "tool", "content": "2"},
    {"role": "tool", "content": "two"},
    {"role": "assistant", "content": "2!"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]
API = [
    *CHAT[:2],
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
    },
    {"role": "tool", "tool_call_id": "x", "content": "2"},
    {"role": "tool", "tool_call_id": "y", "content": "two"},
    *CHAT[5:],
]
LEGACY = [
    *CHAT[:2],
    {"role": "assistant", "content": "", "function_call": {"name": "add", "arguments": {"a": 1}}},
    *CHAT[3:],
]
SHARE = {
    "system": "Be brief.",
    "conversations": [
        {"from": "human", "value": "1 + 1?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "observation", "value": "two"},
        {"from": "gpt", "value": "2!"},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ],
}


def loaded(row: dict[str, Any], place: Path) -> list[dict[str, str]]:
    (place / "x.jsonl").write_text(json.dumps(row) + "\n")
    messages: list[dict[str, str]] = load_chats(place / "x.jsonl")[0]["messages"][0]
    return messages


@pytest.mark.parametrize("row", [{"messages": CHAT}, {"messages": API}, {"messages": LEGACY}, SHARE], ids=range(4))
def test_common_shapes_are_the_same_chat(row: dict[str, Any], tmp_path: Path) -> None:
    assert loaded(row, tmp_path) == CHAT


def test_tools_stand_in_the_system_turn(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    listed = f"<tools>\n{json.dumps(tools[0])}\n</tools>"
    first = loaded({"messages": API, "tools": tools}, tmp_path)[0]
    assert first == {"role": "system", "content": f"Be brief.\n\n{listed}"}
    assert loaded({**SHARE, "tools": json.dumps(tools)}, tmp_path)[0] == first
    assert loaded({"messages": API[1:], "tools": tools}, tmp_path)[0] == {"role": "system", "content": listed}
    assert loaded({"messages": API, "tools": []}, tmp_path) == CHAT


def test_calls_beside_text_and_several_at_once(tmp_path: Path) -> None:
    calls = [{"function": {"name": name, "arguments": {"x": [1, None]}}} for name in "fg"]
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Let me see.", "tool_calls": calls}]
    said = [f'<tool_call>\n{{"name": "{name}", "arguments": {{"x": [1, null]}}}}\n</tool_call>' for name in "fg"]
    assert loaded({"messages": chat}, tmp_path)[1]["content"] == "\n".join(["Let me see.", *said])


def trained(tokenizer: Any, **options: Any) -> tuple[str, str]:
    """What is read, and the text of the tokens that are trained on."""
    rendered = ChatRenderer(tokenizer, end_of_turn=False, **options)([CHAT])[0]
    ids = [i for i, keep in zip(rendered.input_ids, rendered.assistant_mask, strict=True) if keep]
    return rendered.text, tokenizer.decode(ids)


@pytest.mark.parametrize("template", ["native", STRICT], ids=["own", "strict"])
@pytest.mark.parametrize("name", NAMES)
def test_the_assistant_alone_is_trained_on(name: str, template: str, tokenizers: Callable[[str], Any]) -> None:
    """Calls and answers, never results; every text is read, by templates without system and tool too."""
    read, learnt = trained(tokenizers(name), template=template)
    spaceless = "".join(learnt.split())
    assert spaceless == "".join(f"{CALL}2!Yes.".split())
    places = [read.index(text) for text in ("Be brief.", "1 + 1?", CALL, "two", "2!", "Sure?", "Yes.")]
    assert places == sorted(places)
    if template == STRICT:
        assert "[user] Be brief.\n\n1 + 1?" in read
        assert "<tool_response>\n2\n</tool_response>\n\n<tool_response>\ntwo\n</tool_response>" in read
    assert "".join(trained(tokenizers(name), template=template, train_on="last")[1].split()) == "Yes."


QUOTING = (  # results of tools as JSON, as Llama 3.1's; no turn for an empty system, as Phi-3's
    "{% for m in messages %}{% if m['role'] == 'tool' %}[tool] {{ m['content'] | tojson }}{{ eos_token }}\n"
    "{% elif m['role'] != 'system' or m['content'] %}[{{ m['role'] }}] {{ m['content'] | trim }}{{ eos_token }}\n{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("name", NAMES)
def test_what_others_say_may_be_written_otherwise(name: str, tokenizers: Callable[[str], Any]) -> None:
    """In any turn but the assistant's; the same tokens are trained on as where it stands as it is."""
    chat = [{"role": "system", "content": ""}, *CHAT[1:3], {"role": "tool", "content": '{"sum": "2!"}\n2!'}, *CHAT[4:]]
    renderer = ChatRenderer(tokenizers(name), template=QUOTING, end_of_turn=False)
    rendered = renderer([chat])[0]
    assert '[tool] "{\\"sum\\": \\"2!\\"}\\n2!"' in rendered.text and "[system]" not in rendered.text
    said = [rendered.text[first:end] for _, first, end in renderer.content_spans(chat, rendered.text)]
    assert said == [CALL, "2!", "Yes."]
    learnt = [i for i, keep in zip(rendered.input_ids, rendered.assistant_mask, strict=True) if keep]
    assert "".join(tokenizers(name).decode(learnt).split()) == "".join(f"{CALL}2!Yes.".split())


def test_an_answer_must_stand_as_it_is(tokenizers: Callable[[str], Any]) -> None:
    thought = [*CHAT[1:2], {"role": "assistant", "content": "<think>a</think>b"}]
    template = "{% for m in messages %}{{ m['content'] | replace('</think>', ' ') }};{% endfor %}"
    with pytest.raises(
        UserError, match=r"rewrites message 1 \(assistant: '<think>a</think>b'\) so that it is not found"
    ):
        ChatRenderer(tokenizers("pivot"), template=template)([thought])


def test_two_roles_leave_the_assistants_turns_alone() -> None:
    assert [m["content"] for m in in_two_roles(CHAT) if m["role"] == "assistant"] == [CALL, "2!", "Yes."]
    assert [m["role"] for m in in_two_roles(CHAT)] == ["user", "assistant"] * 3
    assert in_two_roles(in_two_roles(CHAT)) == in_two_roles(CHAT)
    late = [CHAT[1], CHAT[5], CHAT[0], CHAT[1], CHAT[5]]
    assert [m["content"] for m in in_two_roles(late)] == ["1 + 1?", "2!", "Be brief.\n\n1 + 1?", "2!"]


def test_prompts_are_asked_as_chats_are_read(tokenizers: Callable[[str], Any]) -> None:
    renderer = ChatRenderer(tokenizers("pivot"), template=STRICT)
    assert renderer.prompt(CHAT[:2]) == "<s>[user] Be brief.\n\n1 + 1?<|end|>\n"
    with pytest.raises(UserError, match="roles must alternate"):
        renderer.prompt([CHAT[5], CHAT[1]])


def test_two_answers_in_a_row_are_no_ones_to_merge(tokenizers: Callable[[str], Any]) -> None:
    with pytest.raises(UserError, match=r"the chat template of .* fails: roles must alternate; see chat\.template"):
        ChatRenderer(tokenizers("pivot"), template=STRICT)([[*CHAT[:3], CHAT[5]]])


def test_a_role_that_is_left_out_is_told(tokenizers: Callable[[str], Any], caplog: pytest.LogCaptureFixture) -> None:
    deaf = (
        "{% for m in messages %}{% if m['role'] in ['user', 'assistant'] %}{{ m['content'] }}\n{% endif %}{% endfor %}"
    )
    with caplog.at_level(logging.WARNING):
        renderer = ChatRenderer(tokenizers("pivot"), template=deaf)
        renderer([CHAT, CHAT[:3], CHAT[1:]])
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.endswith("prints no turn of system, tool: what it says is read by no model")


def test_the_last_turn_alone_is_extracted(mini: Mini, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another store than of all turns, whose fingerprint is as it was; preview shows the roles."""
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(2)))
    world = Mini(tmp_path / "runs", f"chat.path={tmp_path}/x.jsonl")
    world.experiment.mkdir(parents=True)
    (world.experiment / "world").symlink_to(mini.experiment / "world")
    world.run("extract", "source=pivot", "chat.train_on=last")
    store = DistributionStore(world.experiment / "distributions/pivot")
    assert store.manifest["train_on"] == "last"
    counts = store.column("tokens").tolist()
    with pytest.raises(UserError, match="train_on"):
        world.run("extract", "source=pivot")
    world.run("extract", "source=pivot", "overwrite=true")
    again = DistributionStore(world.experiment / "distributions/pivot")
    assert "train_on" not in again.manifest
    assert all(few < many for few, many in zip(counts, again.column("tokens").tolist(), strict=True))
    world.run("extract", "source=a", "chat.train_on=last")
    with pytest.raises(UserError, match=r"2 chats read .* both with the same chat\.train_on, which was all / last"):
        world.run("align", "source=a")
    world.run("preview", "source=pivot", "preview.show=1")
    assert "</tool_call><|end|><|tool|>2<|end|>" in capsys.readouterr().out


THINKING = (  # as Qwen 3's: the thought of the last answer, and an empty one where it has none; of earlier ones the answer
    "{% set ns = namespace(asked=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set parts = m.content.split('</think>') %}{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts[1:] else '' %}"
    "{{ '[' + m.role + ']\n' }}{% if m.role == 'assistant' and loop.index0 > ns.asked and (loop.last or thought) %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ parts[-1].lstrip('\n') + eos_token + '\n' }}{% endfor %}"
)
TIGHT = THINKING.replace(
    "'<think>\n' + thought + '\n</think>\n\n'", "'<think>' + thought + '</think>\n'"
)  # as GLM 4.5's
DEAF = "{% for m in messages %}[{{ m.role }}] {{ m.content.split('</think>')[-1].lstrip('\n') }}{{ eos_token }}{% endfor %}"
VERBATIM = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
OPENED = "<think>\nPeano?\n</think>\n\n"


@pytest.mark.parametrize(
    ("template", "said", "heard"),
    [
        (THINKING, [f"{OPENED}2", f"{OPENED}4"], ["2", f"{OPENED}4"]),
        (THINKING, ["<think>Peano?</think>2", "<think>Peano?</think>4"], ["2", f"{OPENED}4"]),
        (THINKING, [f"{OPENED}2", "4"], ["2", "4"]),
        (THINKING, [f"{OPENED}2", "<think>\n\n</think>\n\n4"], ["2", "4"]),
        (THINKING, ["2", "Is it Peano?</think>4"], ["2", "<think>\nIs it Peano?\n</think>\n\n4"]),
        (TIGHT, [f"{OPENED}2", f"{OPENED}4"], ["2", "<think>Peano?</think>\n4"]),
        (DEAF, [f"{OPENED}2", f"{OPENED}4"], ["2", "4"]),
        (VERBATIM, [f"{OPENED}2", f"{OPENED}4"], [f"{OPENED}2", f"{OPENED}4"]),
    ],
)
def test_thoughts_are_trained_on_where_the_template_keeps_them(
    template: str, said: list[str], heard: list[str], tokenizers: Callable[[str], Any]
) -> None:
    """Whatever stands around them, also where the question holds the same words; every turn ends with its token."""
    chat = [
        {"role": role, "content": text}
        for question, answer in zip((f"{OPENED}2", "2 + 2?"), said, strict=True)
        for role, text in (("user", question), ("assistant", answer))
    ]
    renderer = ChatRenderer(tokenizers("a"), template=template)
    rendered = renderer([chat])[0]
    spans = renderer.content_spans(chat, rendered.text)
    assert [rendered.text[first:end] for index, first, end in spans if index % 2] == heard
    learnt = [int(i) for i, keep in zip(rendered.input_ids, rendered.assistant_mask, strict=True) if keep]
    eos = renderer.tokenizer.eos_token_id
    assert [learnt.count(eos), learnt[-1]] == [2, eos]
    texts = renderer.tokenizer.decode(learnt).split(renderer.tokenizer.eos_token)
    assert ["".join(text.split()) for text in texts] == ["".join(text.split()) for text in (*heard, "")]
