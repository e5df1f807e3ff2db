"""Prompts through a model's own chat template, with tools where it takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_kvpca.errors import OptionsError

Message = dict[str, Any]
Tool = dict[str, Any]
_PROBE = "name_of_a_tool_to_look_for"


def has_one(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def takes_tools(tokenizer: Any) -> bool:
    """Whether the template shows the model the tools that it is given."""
    tool = {"name": _PROBE, "description": "", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": tool}]
    return has_one(tokenizer) and _PROBE in render(tokenizer, [_asked("Hello")], tools)


def _asked(content: str) -> Message:
    return {"role": "user", "content": content}


def render(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool] = (), begun: bool = True
) -> str:
    """The conversation as text.

    Args:
        begun: whether it ends with the beginning of the model's answer.
    """
    return tokenizer.apply_chat_template(
        list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=begun
    )


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of rendered text, which has its special tokens already."""
    return tokenizer(text, add_special_tokens=False).input_ids


def with_calls(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a conversation, and where the assistant's calls of tools lie in it.

    A call reaches from its tool's name to the end of its last argument. What the template puts
    around it is left out: a model may never have learned those tags, and would write the same
    call in others.

    Returns:
        Token ids, and the first token of each call and the one after its last.

    Raises:
        OptionsError: the template changes what came before when a message is added.
    """
    whole = render(tokenizer, messages, tools, begun=False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:index], tools)
        after = render(tokenizer, messages[: index + 1], tools, begun=False)
        if not (whole.startswith(after) and after.startswith(before)):
            raise OptionsError(
                "the model's chat template rewrites earlier messages, so a conversation cannot be "
                "read as one sequence: take another model."
            )
        name = message["tool_calls"][0]["function"]["name"]
        first = after.index(name, len(before))
        # Without closing braces, which share their tokens with what follows.
        spans.append((first, len(after[: after.rindex("}")].rstrip("} \n"))))
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    return found.input_ids, [_tokens_in(span, found.offset_mapping) for span in spans]


def _tokens_in(span: tuple[int, int], offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Tokens that begin before the span's first character has ended, and end within it."""
    first, end = span
    inside = [i for i, (_, stop) in enumerate(offsets) if first < stop <= end]
    return inside[0], inside[-1] + 1
