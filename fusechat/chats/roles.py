"""Who speaks in a chat: names of roles in the formats people have, calls of tools as text, and what templates lack.

Every model must read the same text, whatever its template knows of tools. So calls and results are text of the turn, in
the form that Hermes and Qwen models are trained on, and a template without a role reads its turns as the user's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, str]
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"} | {
    role: role for role in ("system", "user", "assistant", "tool", "developer")
}
CALLS = "function_call"  # the role of a ShareGPT turn that is a call
ROLES |= {CALLS: "assistant", "observation": "tool", "function": "tool"}
FIRST = ("system", "developer")  # roles whose text a template without them finds in the first turn of the user


def calls_of(turn: Mapping[str, Any]) -> list[str]:
    """The calls of tools that a turn of a chat API holds beside its content, as text."""
    calls = [call.get("function") or call for call in turn.get("tool_calls") or []]
    calls += [turn[CALLS]] if turn.get(CALLS) else []
    return [called({"name": call["name"], "arguments": _read(call.get("arguments"))}) for call in calls]


def called(call: Any) -> str:
    """A call as text; what is text already stays as it is."""
    text = call if isinstance(call, str) else json.dumps(call, ensure_ascii=False)
    return text if "<tool_call>" in text else f"<tool_call>\n{text}\n</tool_call>"


def tools_of(tools: Any) -> str:
    """The tools that a chat offers, one a line; nothing where there are none."""
    listed = _read(tools) or []
    lines = [listed] if isinstance(listed, str) else [json.dumps(_held(tool), ensure_ascii=False) for tool in listed]
    return "\n".join(["<tools>", *lines, "</tools>"]) if lines else ""


def introduced(turns: list[Message], system: str) -> list[Message]:
    """The chat with a text that its row has beside it, in its system turn."""
    if not system:
        return turns
    if turns and turns[0]["role"] in FIRST:
        return [{**turns[0], "content": "\n\n".join(filter(None, (turns[0]["content"], system)))}, *turns[1:]]
    return [{"role": "system", "content": system}, *turns]


def in_two_roles(chat: Sequence[Message]) -> list[Message]:
    """The chat for a template that knows user and assistant alone, and wants them in turns.

    What system and developer say stands before the next text of the user, after an empty line; a tool's result is the
    user's, marked as one. The assistant's turns stay as they are, each for itself.
    """
    found = list[Message]()
    for message in chat:
        role, content = message["role"], message["content"]
        if role == "assistant":
            found.append({"role": role, "content": content})
            continue
        content = f"<tool_response>\n{content}\n</tool_response>" if role == "tool" else content
        if found and found[-1]["role"] == "user":
            found[-1] = {"role": "user", "content": f"{found[-1]['content']}\n\n{content}"}
        else:
            found.append({"role": "user", "content": content})
    return found


def _read(value: Any) -> Any:
    """What a text of JSON says; anything else as it is."""
    if not isinstance(value, str):
        return _held(value)
    try:
        return json.loads(value)
    except ValueError:
        return value


def _held(value: Any) -> Any:
    """Without the keys that a table's rows have for other rows' sake."""
    if isinstance(value, Mapping):
        return {key: _held(each) for key, each in value.items() if each is not None}
    return [_held(each) for each in value] if isinstance(value, list) else value
