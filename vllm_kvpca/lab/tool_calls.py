"""Tools as models are shown them, and the calls that a model's answer holds.

Tools are those of the Berkeley Function Calling Leaderboard (BFCL): name, description, and
parameters whose types are named as Python's.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_kvpca.lab.chat_template import Message, Tool

_JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_BLOCK = re.compile(r"```[a-zA-Z]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict[str, Any]


def as_tool(function: dict[str, Any]) -> Tool:
    """A function of the benchmark in the form that chat templates take, with JSON's types."""
    shown = {key: function[key] for key in ("name", "description", "parameters")}
    return {"type": "function", "function": _with_json_types(shown)}


def _with_json_types(node: Any) -> Any:
    if isinstance(node, list):
        return [_with_json_types(one) for one in node]
    if not isinstance(node, dict):
        return node
    changed = {key: _with_json_types(value) for key, value in node.items()}
    # A parameter may itself be called "type": then it is no string here.
    if isinstance(node.get("type"), str):
        changed["type"] = _JSON_TYPES.get(node["type"], node["type"])
    return changed


def asked_in_words(functions: Sequence[dict[str, Any]]) -> Message:
    """The tools as a system message, for a model whose chat template takes none."""
    listed = "\n".join(json.dumps(as_tool(function)["function"]) for function in functions)
    return {
        "role": "system",
        "content": (
            "You may call these functions, given as JSON, one on each line:\n"
            f"{listed}\n"
            "If they answer the user's request, write nothing but the calls, as a Python list of "
            'calls with named arguments: [first_function(name="value", number=1)]'
        ),
    }


def read_calls(answer: str) -> list[Call] | None:
    """The calls in an answer, None where it holds none or is malformed.

    The tags that a chat template asks for come first. Small models leave them out and write the
    same JSON alone or in a code block; calls in Python's form count too.
    """
    parts = _TAGGED.findall(answer) or _BLOCK.findall(answer) or [answer]
    try:
        calls = [call for part in parts for call in _read(part.strip())]
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None
    return calls or None


def _read(text: str) -> list[Call]:
    try:
        return [_from_json(value) for value in _json_values(text)]
    except ValueError:
        return _from_python(text)


def _json_values(text: str) -> list[Any]:
    """Values one after the other; a list of calls counts as its calls.

    Raises:
        ValueError: something else stands between them.
    """
    decoder, values, at = json.JSONDecoder(strict=False), [], 0
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        values += value if isinstance(value, list) else [value]
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n,;"))
    return values


def _from_json(value: Any) -> Call:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("no call")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("arguments without names")
    return Call(value["name"], arguments)


def _from_python(text: str) -> list[Call]:
    body = ast.parse(text, mode="eval").body
    return [_from_call(node) for node in getattr(body, "elts", [body])]


def _from_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
        raise ValueError("no call with named arguments alone")
    arguments = {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
    return Call(ast.unparse(node.func), arguments)


def _value(node: ast.expr) -> Any:
    """A literal's value; a variable or an expression is its own text."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
