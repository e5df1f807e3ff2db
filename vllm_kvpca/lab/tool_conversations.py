"""BFCL's multi-turn cases as whole conversations: the reference's calls and what they gave back.

A case holds the user's turns and the reference's calls. What makes its context long (file contents,
listings, bookings) comes back from the calls, so they are carried out on the benchmark's simulated
services: plain Python objects in memory, of the installed package. A call is read as its name and
literals; nothing is evaluated.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from vllm_kvpca.lab.benchmark_data import BFCL, data_file, json_lines
from vllm_kvpca.lab.chat_template import Message, Tool
from vllm_kvpca.lab.tool_calls import Call, as_tool

CATEGORY = "multi_turn_long_context"
_CODE = f"{BFCL.module}.eval_checker.multi_turn_eval.func_source_code"
_SERVICES = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TwitterAPI": "posting_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "VehicleControlAPI": "vehicle_control",
}
"""Class, and the file that it and its tools' documentation are in."""


@dataclass(frozen=True)
class Conversation:
    """Every turn of the user, each followed by the reference's calls, one after the other."""

    name: str
    tools: list[Tool]
    messages: list[Message]


def data_files() -> list[Path]:
    """Questions, answers and documentation of the tools.

    Raises:
        SetupError: the data are not installed.
    """
    cases = f"BFCL_v4_{CATEGORY}.json"
    docs = (f"multi_turn_func_doc/{file}.json" for file in _SERVICES.values())
    return [data_file(BFCL, name) for name in (cases, f"possible_answer/{cases}", *docs)]


def load(limit: int | None = None) -> list[Conversation]:
    """The cases in the order of the file.

    Args:
        limit: how many, from the first; None for all.
    """
    cases, answers, *_ = (json_lines(path) for path in data_files()[:2])
    calls = {answer["id"]: answer["ground_truth"] for answer in answers}
    return [_conversation(case, calls[case["id"]]) for case in cases[:limit]]


def _conversation(case: dict[str, Any], calls: Sequence[Sequence[str]]) -> Conversation:
    services = [_service(name, case["initial_config"]) for name in case["involved_classes"]]
    messages: list[Message] = []
    for asked, reference in zip(case["question"], calls, strict=True):
        messages += [*asked, *_carried_out(reference, services)]
    tools = [
        as_tool(function)
        for name in case["involved_classes"]
        for function in json_lines(data_file(BFCL, f"multi_turn_func_doc/{_SERVICES[name]}.json"))
        if function["name"] not in case.get("excluded_function", ())
    ]
    return Conversation(case["id"], tools, messages)


def _service(name: str, configurations: dict[str, Any]) -> Any:
    service = getattr(import_module(f"{_CODE}.{_SERVICES[name]}"), name)()
    if hasattr(service, "_load_scenario"):
        service._load_scenario(deepcopy(configurations.get(name, {})), long_context=True)
    return service


def _carried_out(reference: Sequence[str], services: Sequence[Any]) -> Iterator[Message]:
    for text in reference:
        node = ast.parse(text, mode="eval").body
        assert isinstance(node, ast.Call)
        method = _method(ast.unparse(node.func), services)
        call = _call(node, method)
        function = {"name": call.name, "arguments": call.arguments}
        calls = [{"type": "function", "function": function}]
        yield {"role": "assistant", "content": "", "tool_calls": calls}
        yield {"role": "tool", "name": call.name, "content": _result(method, call)}


def _method(name: str, services: Sequence[Any]) -> Any:
    """Public methods alone; of two services with one of that name the later is asked."""
    assert not name.startswith("_")
    return next(getattr(one, name) for one in reversed(services) if hasattr(one, name))


def _call(node: ast.Call, method: Any) -> Call:
    """With the parameters' names where the reference leaves them out."""
    names = list(inspect.signature(method).parameters)
    values = [ast.literal_eval(value) for value in node.args]
    named = {str(one.arg): ast.literal_eval(one.value) for one in node.keywords}
    return Call(method.__name__, dict(zip(names, values, strict=False)) | named)


def _result(method: Any, call: Call) -> str:
    """What a service answers, as the benchmark writes it; a failure is an answer, too."""
    try:
        result = method(**deepcopy(call.arguments))
    except Exception as error:
        return f"Error during execution: {error}"
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result) if isinstance(result, dict) else str(result)
    except (TypeError, ValueError):
        return str(result)
