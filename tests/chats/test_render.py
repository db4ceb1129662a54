"""Rendering: what is the assistant's, with offsets and without, cut and whole."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusechat.app.errors import UserError
from fusechat.chats.render import ChatRenderer, Rendered

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
