"""What a model's answer calls, and whether it is what a case of BFCL asks for."""

import json

import pytest

from vllm_kvpca.lab.tool_calls import Call, as_tool, read_calls
from vllm_kvpca.lab.tool_match import matches

A = Call("weather.now", {"place": "Oslo", "days": 2})
B = Call("add", {"a": -1.5, "b": [1, "x"]})


def tagged(*calls):
    written = (json.dumps({"name": c.name, "arguments": c.arguments}) for c in calls)
    return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in written)


@pytest.mark.parametrize(
    ("answer", "calls"),
    [
        (tagged(A), [A]),
        (f"I shall look.\n{tagged(A, B)}", [A, B]),
        (tagged(A).removesuffix("</tool_call>"), [A]),
        ('{"name": "add", "arguments": {"a": -1.5, "b": [1, "x"]}}', [B]),
        ('{"name": "add", "arguments": "{\\"a\\": -1.5, \\"b\\": [1, \\"x\\"]}"}', [B]),
        ('```json\n[{"name": "weather.now", "arguments": {"place": "Oslo", "days": 2}}]\n```', [A]),
        ('{"name": "f", "arguments": {}}\n{"name": "f", "parameters": {}}', [Call("f", {})] * 2),
        ('[weather.now(place="Oslo", days=2), add(a=-1.5, b=[1, "x"])]', [A, B]),
        ('```python\nadd(a=-1.5, b=[1, "x"])\n```', [B]),
        ("f(x=some_variable)", [Call("f", {"x": "some_variable"})]),
        ("f(True)", None),  # which parameter?
        ("I cannot do that.", None),
        ("", None),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>', None),
        ('<tool_call>{"arguments": {"a": 1}}</tool_call>', None),
        ("[" * 5000, None),
    ],
)  # fmt: skip
def test_calls_are_read_in_every_form_that_models_write(answer, calls):
    assert read_calls(answer) == calls


FUNCTION = {
    "name": "book",
    "description": "Books.",
    "parameters": {
        "type": "dict",
        "required": ["city"],
        "properties": {
            "city": {"type": "string"},
            "nights": {"type": "integer", "default": 1},
            "price": {"type": "float"},
            "quiet": {"type": "boolean"},
            "guests": {"type": "array", "items": {"type": "string"}},
            "span": {"type": "tuple", "items": {"type": "integer"}},
            "card": {"type": "dict", "properties": {"type": {"type": "string"}}},
            "rooms": {"type": "array", "items": {"type": "dict"}},
        },
    },
}
RIGHT = {
    "city": ["New York, NY", "NYC"],
    "nights": [2, ""],
    "price": [100.0, ""],
    "quiet": [True, ""],
    "guests": [["Ann", "Bo"], ""],
    "span": [[1, 3], ""],
    "card": [{"type": ["Visa"], "year": [2030, ""]}, ""],
    "rooms": [[{"beds": [2]}, {"beds": [1]}], ""],
}


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ({"city": "NYC"}, True),
        ({"city": "new york ny"}, True),  # case, spaces and punctuation do not count
        ({"city": "Boston"}, False),
        ({}, False),
        ({"nights": 2}, False),  # city is required
        ({"city": "NYC", "view": "sea"}, False),  # there is no such parameter
        ({"city": "NYC", "nights": 2}, True),
        ({"city": "NYC", "nights": 2.0}, False),
        ({"city": "NYC", "nights": "2"}, False),
        ({"city": "NYC", "price": 100}, True),  # a whole number for a float
        ({"city": "NYC", "price": "100"}, False),
        ({"city": "NYC", "quiet": True}, True),
        ({"city": "NYC", "quiet": 1}, False),
        ({"city": "NYC", "guests": ["ann", "BO"]}, True),
        ({"city": "NYC", "guests": ["Bo", "Ann"]}, False),  # order counts inside a list
        ({"city": "NYC", "guests": ["Ann", 2]}, False),
        ({"city": "NYC", "span": (1, 3)}, True),
        ({"city": "NYC", "card": {"type": "visa"}}, True),
        ({"city": "NYC", "card": {"type": "visa", "year": 2031}}, False),
        ({"city": "NYC", "card": {"year": 2030}}, False),
        ({"city": "NYC", "rooms": [{"beds": 2}, {"beds": 1}]}, True),
        ({"city": "NYC", "rooms": [{"beds": 2}]}, False),
        ({"city": "NYC", "rooms": [{"beds": 1}, {"beds": 2}]}, False),
        ({"city": None}, False),
        ({"city": "NYC", "guests": None}, False),
    ],
)
def test_arguments_match_one_of_the_right_values(arguments, right):
    assert matches([Call("book", arguments)], [FUNCTION], [{"book": RIGHT}]) is right


def test_a_variable_counts_by_its_name():
    function = {"name": "f", "parameters": {"properties": {"n": {"type": "integer"}}}}
    assert matches([Call("f", {"n": "count"})], [function], [{"f": {"n": ["count"]}}])
    assert not matches([Call("f", {"n": "Count"})], [function], [{"f": {"n": ["count"]}}])


def test_several_calls_match_in_any_order_and_each_once():
    function = {"name": "f", "parameters": {"properties": {"n": {"type": "integer"}}}}
    one, two = (Call("f", {"n": n}) for n in (1, 2))
    expected = [{"f": {"n": [1]}}, {"f": {"n": [2]}}]
    assert matches([two, one], [function], expected)
    for wrong in ([one], [one, one], [one, two, two], [], None, [one, Call("g", {"n": 2})]):
        assert not matches(wrong, [function], expected)
    # 1.0 is no integer, though Python holds it equal to 1.
    double = [{"f": {"n": [1]}}, {"f": {"n": [1]}}]
    assert not matches([Call("f", {"n": 1.0}), one, one], [function], [*double, *double[:1]])


def test_tools_are_shown_with_the_types_of_json():
    shown = as_tool(FUNCTION)["function"]["parameters"]
    assert shown["type"] == "object"
    properties = shown["properties"]
    assert [properties[x]["type"] for x in ("price", "span", "card")] == [
        "number",
        "array",
        "object",
    ]
    assert properties["card"]["properties"]["type"] == {"type": "string"}  # a parameter's own name
    assert FUNCTION["parameters"]["type"] == "dict"
