"""`vllm serve --kv-compression-preset ... --kv-compress-after ... --kv-keep-recent ...`"""

from __future__ import annotations

import argparse
from typing import Any

from vllm_kvpca.pages.boundary import DEFAULT_COMPRESS_AFTER, DEFAULT_KEEP_RECENT
from vllm_kvpca.serving.adapters.changes import Patch, Wrap
from vllm_kvpca.serving.log import contained
from vllm_kvpca.serving.settings.options import KEY

_KEYS = {
    "kv_compression_preset": "preset",
    "kv_compress_after": "compress_after",
    "kv_keep_recent": "keep_recent",
    "kv_allow_other_weights": "allow_other_weights",
}
"""Name in the parsed arguments -> key of the options."""

_FLAGS: dict[str, dict[str, Any]] = {
    "--kv-compression-preset": {
        "metavar": "NAME_OR_PATH",
        "help": "A shipped preset (`vllm-kvpca presets` lists them), a preset folder, or a "
        "Hub repository, or auto. Without it nothing is compressed.",
    },
    "--kv-compress-after": {
        "type": int,
        "metavar": "TOKENS",
        "help": "Sequences of at most this many tokens stay raw "
        f"(default: {DEFAULT_COMPRESS_AFTER}).",
    },
    "--kv-keep-recent": {
        "type": int,
        "metavar": "TOKENS",
        "help": "Tokens at the end of a longer sequence that stay raw "
        f"(default: {DEFAULT_KEEP_RECENT}).",
    },
    "--kv-allow-other-weights": {
        "nargs": 0,
        "const": True,
        "help": "Take a preset that was calibrated on other weights of the same shape, for a "
        "fine-tune say: what it costs is then not measured.",
    },
}
FLAGS = tuple(_FLAGS)


class _StoreOption(argparse.Action):
    """Keeps a flag in `additional_config` at once: further API-server processes get the
    parsed namespace and run vLLM's own `from_cli_args`."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)
        _keep(_given(namespace), namespace)


def _given(namespace: Any) -> dict[str, Any]:
    """The options that were given as flags."""
    values = {key: getattr(namespace, name, None) for name, key in _KEYS.items()}
    return {key: value for key, value in values.items() if value is not None}


def _keep(options: dict[str, Any], owner: Any) -> None:
    """Add options to owner.additional_config."""
    config = dict(owner.additional_config or {})
    owner.additional_config = {**config, KEY: {**(config.get(KEY) or {}), **options}}


def add_flags(parser: Any, action: type[argparse.Action], **changed: Any) -> None:
    """Add the flags, in a group of their own, to a parser of vLLM."""
    group = parser.add_argument_group(
        title="KV compression",
        description="vllm-kvpca: store the KV cache of full-attention layers compressed.",
    )
    for flag, settings in _FLAGS.items():
        options = {**settings, **changed}
        group.add_argument(flag, action=action, default=argparse.SUPPRESS, **options)


def _add_cli_args(original: Any) -> Any:
    def wrapper(parser: Any) -> Any:
        parser = original(parser)
        with contained("adding the flags of KV compression"):
            add_flags(parser, _StoreOption)
        return parser

    return wrapper


def _from_cli_args(original: Any) -> Any:
    def wrapper(cls: Any, args: Any) -> Any:
        # A later --additional-config on the command line would have dropped our key.
        engine_args = original(cls, args)
        if options := _given(args):
            _keep(options, engine_args)
        return engine_args

    return wrapper


PATCH = Patch(
    title="flags",
    why="A general plugin cannot add engine arguments.",
    how="`add_cli_args` adds a group of four flags to vLLM's parser. Each keeps its value in "
    '`additional_config["kv_compression"]`, which reaches every process; `from_cli_args` puts it '
    "there once more, because an --additional-config behind the flag would replace it.",
    waits_for="a way for general plugins to add engine arguments",
    fails="The parser then refuses the flags as unknown. Without the flags nothing is touched.",
    changes=(
        Wrap("vllm.engine.arg_utils:EngineArgs.add_cli_args", _add_cli_args, ("parser",)),
        Wrap("vllm.engine.arg_utils:EngineArgs.from_cli_args", _from_cli_args, ("cls", "args")),
    ),
)
