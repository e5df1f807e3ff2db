"""The reference page, from the code it describes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import typer

from vllm_kvpca.errors import KvpcaError

ENVIRONMENT = {
    "KVPCA_ALLOW_UNTESTED_VLLM": "`1`: use a version of vLLM that is not among the tested ones.",
    "KVPCA_CACHE_DIR": "Where the demo model and texts of datasets are kept; by default the "
    "user's cache folder.",
    "KVPCA_DEVICE": "`cpu` or `gpu`: which build of vLLM `make setup` installs; by default it "
    "looks for a GPU.",
    "KVPCA_SOURCE_COMMIT": "Commit that records name, for a source tree that travelled without "
    "its git folder.",
}
"""Every environment variable of our own."""

_HEAD = """# Reference

This page is made from the code: `vllm-kvpca api-docs`.

## Server

| `vllm serve` | `additional_config["kv_compression"]` | default | meaning |
| --- | --- | --- | --- |
| `--kv-compression-preset NAME_OR_PATH` | `"preset"` | off | shipped name, `./folder`, Hub \
repository `org/name[@revision]`, or `auto` |
| `--kv-compress-after TOKENS` | `"compress_after"` | {after} | sequences of at \
most this many tokens stay raw |
| `--kv-keep-recent TOKENS` | `"keep_recent"` | {recent} | tokens at the end of a \
longer sequence that stay raw |
| `--kv-allow-other-weights` | `"allow_other_weights"` | false | take a preset that was calibrated \
on other weights of the same shape |

`GET /kv_compression` and `/metrics`: [deploy](deploy.md), [metrics](metrics.md).

## Environment

| variable | meaning |
| --- | --- |
"""


def page(app: typer.Typer) -> str:
    """The whole page.

    Args:
        app: all commands.
    """
    from vllm_kvpca.pages.boundary import DEFAULT_COMPRESS_AFTER, DEFAULT_KEEP_RECENT

    head = _HEAD.format(after=DEFAULT_COMPRESS_AFTER, recent=DEFAULT_KEEP_RECENT)
    variables = [f"| `{name}` | {meaning} |" for name, meaning in ENVIRONMENT.items()]
    parts = [head.rstrip("\n"), *variables, "", "## Python", ""]
    return "\n".join([*parts, *_python(), "## Errors", "", *_errors(), *_commands(app)]) + "\n"


def _python() -> Iterator[str]:
    """Signature and docstring of every public name."""
    import vllm_kvpca

    for name in sorted(set(vllm_kvpca.__all__) - {"__version__"}):
        function = getattr(vllm_kvpca, name)
        parameters = [
            str(parameter.replace(annotation=inspect.Parameter.empty))
            for parameter in inspect.signature(function).parameters.values()
        ]
        keyword_only = [p.kind for p in inspect.signature(function).parameters.values()]
        if inspect.Parameter.KEYWORD_ONLY in keyword_only:
            parameters.insert(keyword_only.index(inspect.Parameter.KEYWORD_ONLY), "*")
        yield f"### `vllm_kvpca.{name}({', '.join(parameters)})`"
        yield ""
        yield "```text"
        yield inspect.getdoc(function) or ""
        yield "```"
        yield ""


def _errors() -> Iterator[str]:
    """The tree, as nested lists."""
    yield "In `vllm_kvpca.errors`; all are `ValueError`s, and each message says what to do."
    yield ""
    yield from _tree(KvpcaError, 0)


def _tree(error: type, depth: int) -> Iterator[str]:
    yield f"{'  ' * depth}- `{error.__name__}`: {inspect.getdoc(error)}"
    subclasses: list[type] = error.__subclasses__()
    for below in subclasses:
        if below.__module__ == KvpcaError.__module__:
            yield from _tree(below, depth + 1)


def _commands(app: typer.Typer) -> Iterator[str]:
    yield ""
    yield "## Commands"
    yield ""
    yield "`vllm-kvpca COMMAND --help` says the same."
    for words, command in _leaves("vllm-kvpca", typer.main.get_command(app)):
        yield ""
        yield f"### `{words}`"
        yield ""
        yield _one_line(command.help or "")
        rows = [_option(option) for option in command.params if getattr(option, "help", None)]
        if rows:
            yield ""
            yield "| option | default | meaning |"
            yield "| --- | --- | --- |"
            yield from rows


def _leaves(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    below: dict[str, Any] | None = getattr(command, "commands", None)
    if below is None:
        yield words, command
        return
    for name in sorted(below):
        yield from _leaves(f"{words} {name}", below[name])


def _option(option: Any) -> str:
    names = "`, `".join([*option.opts, *option.secondary_opts])
    default = option.default
    if isinstance(default, (list, tuple)):
        default = " ".join(map(str, default))
    off = default is None or default is False or callable(default) or default == ""
    shown = "required" if option.required else "" if off else f"`{default}`"
    return f"| `{names}` | {shown} | {_one_line(option.help)} |"


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")
