"""Whether calls are those that a BFCL case asks for: the benchmark's match of syntax trees.

A case lists for each call its function and, for each parameter, every value that counts as right;
"" among them means that the parameter may be left out. Texts are compared without spaces, case and
some punctuation. Only Python's types are matched here, as in the benchmark's categories for Python.
Definition: Patil et al., The Berkeley Function Calling Leaderboard, ICML 2025; the cases' own
README.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vllm_kvpca.lab.tool_calls import Call

Expected = dict[str, dict[str, list[Any]]]
"""One call: the function's name, then its parameters and their right values."""

_TYPES: dict[str, Any] = {
    **{"string": str, "any": str, "integer": int, "float": float, "boolean": bool},
    **{"array": list, "tuple": list, "dict": dict},
}
_LEFT_OUT = ""
_IGNORED = re.compile(r"[ ,./\-_*^]")


def matches(
    calls: Sequence[Call] | None, functions: Sequence[dict[str, Any]], expected: Sequence[Expected]
) -> bool:
    """Whether each expected call has a call of its own that matches, and none is left over.

    Order does not matter. Expected calls choose in turn, as in the benchmark.

    Args:
        calls: None is no call.
        functions: that the model was shown.
    """
    if calls is None or len(calls) != len(expected):
        return False
    left = list(calls)
    for one in expected:
        [(name, values)] = one.items()
        function = next(f for f in functions if f["name"] == name)
        fitting = (i for i, call in enumerate(left) if _call_matches(call, function, values))
        if (index := next(fitting, None)) is None:
            return False
        del left[index]
    return True


def _call_matches(call: Call, function: dict[str, Any], values: dict[str, list[Any]]) -> bool:
    documented = function["parameters"]["properties"]
    required = function["parameters"].get("required", [])
    if call.name != function["name"] or any(name not in call.arguments for name in required):
        return False
    if any(name not in call.arguments and _LEFT_OUT not in values[name] for name in values):
        return False
    return all(
        name in documented
        and name in values
        and _value_matches(value, documented[name], values[name])
        for name, value in call.arguments.items()
    )


def _value_matches(value: Any, documented: dict[str, Any], right: list[Any]) -> bool:
    kind = _TYPES[documented["type"]]
    of_items = documented.get("items", {}).get("type") if kind is list else None
    inner = _TYPES[of_items] if of_items else None
    if documented["type"] == "float" and type(value) is int:
        value = float(value)
    elif documented["type"] == "tuple" and isinstance(value, tuple):
        value = list(value)
    named = _type_of(right)
    if type(value) is not kind:
        # A variable: its name is a text, whatever the parameter's type.
        return type(value) is named and value in right
    if inner and not any(_items_fit(value, option, inner) for option in right):
        return False
    if named not in (None, kind):
        return value in right
    return _equal(value, right, kind, inner)


def _type_of(right: list[Any]) -> type | None:
    return next((type(option) for option in right if option != _LEFT_OUT), None)


def _items_fit(value: list[Any], option: Any, inner: type) -> bool:
    """Whether every item has the documented type, or that of the right items (a variable)."""
    if not isinstance(option, list):
        return True
    named = _type_of(option)
    return all(type(item) is inner or type(item) is named for item in value)


def _equal(value: Any, right: list[Any], kind: type, inner: type | None) -> bool:
    if kind is dict:
        return any(_dict_matches(value, option) for option in right if option != _LEFT_OUT)
    if kind is list and inner is dict:
        return any(_dicts_match(value, option) for option in right)
    if kind is list:
        return [_text(item) for item in value] in [[_text(x) for x in option] for option in right]
    if kind is str:
        return _text(value) in [_text(option) for option in right if isinstance(option, str)]
    return value in right


def _dict_matches(value: Any, option: dict[str, list[Any]]) -> bool:
    if not isinstance(value, dict) or any(key not in option for key in value):
        return False
    if any(key not in value and _LEFT_OUT not in right for key, right in option.items()):
        return False
    return all(_text(x) in [_text(one) for one in option[key]] for key, x in value.items())


def _dicts_match(value: list[Any], option: Any) -> bool:
    if len(value) != len(option):
        return False
    return all(_dict_matches(x, one) for x, one in zip(value, option, strict=True))


def _text(value: Any) -> Any:
    """A text without what is ignored; anything else as it is."""
    return _IGNORED.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value
