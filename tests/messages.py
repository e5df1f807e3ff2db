"""Every message that the product refuses or warns with, read from its source.

What is filled in is shown as "…", so that a message is one text whatever it is about.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from vllm_kvpca import errors

PACKAGE = Path(__file__).parents[1] / "vllm_kvpca"
GAP = "…"
ERRORS = {
    "RuntimeError",  # of doctor and of measurements
    *(name for name, value in vars(errors).items() if isinstance(value, type)),
}
WARNINGS = {"warning", "exception", "warn"}
TABLES = ("serving/settings/refusals.py", "serving/step/attention.py")
"""Where refusals are tables of (whether it is so, what to say)."""


def messages(folder: Path = PACKAGE) -> dict[str, str]:
    """Each message by where it is: "serving/platform.py:30"."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        for line, text in of_source(path.read_text(), name in TABLES):
            found[f"{name}:{line}"] = text
    return found


def of_source(source: str, tables: bool = False) -> Iterator[tuple[int, str]]:
    """(line, message) of each error of ours and of each warning.

    Args:
        tables: whether pairs of a condition and a text count.
    """
    tree = ast.parse(source)
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and _is_message(node.func):
            text = _text(node.args[0], constants)
            yield node.lineno, re.sub(r"%[sdr]", GAP, text)
        if tables and isinstance(node, ast.Tuple) and len(node.elts) == 2:
            text = _text(node.elts[1], constants)
            if text != GAP and not isinstance(node.elts[0], ast.Constant):
                yield node.lineno, text


def _is_message(function: ast.expr) -> bool:
    if isinstance(function, ast.Name):
        return function.id in ERRORS
    return isinstance(function, ast.Attribute) and function.attr in WARNINGS


def _text(node: ast.expr, constants: dict[str, ast.expr]) -> str:
    """A string expression with a gap for whatever is not a string in the source."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        known = isinstance(node.value, ast.Name) and node.value.id in constants
        return _text(constants[node.value.id], constants) if known else GAP
    if isinstance(node, ast.BinOp):
        return _text(node.left, constants) + _text(node.right, constants)
    return GAP
