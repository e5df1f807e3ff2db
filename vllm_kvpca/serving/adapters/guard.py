"""Where vLLM was left as it is: whoever asks for compression is refused and told why.

Unchanged, vLLM would take `additional_config["kv_compression"]` without effect and call the flags
unknown. So two names are wrapped by what only looks: the parser gets hidden flags that refuse, and
a configuration that asks for compression is refused. A `vllm` command whose arguments cannot ask
for it is left alone entirely.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from vllm_kvpca.errors import UnsupportedError
from vllm_kvpca.serving.adapters.changes import Misfit, Step, Wrap, make_all
from vllm_kvpca.serving.adapters.flags import FLAGS, add_flags
from vllm_kvpca.serving.log import contained
from vllm_kvpca.serving.settings.options import asks_for_compression

_MAY_HOLD_IT = (*FLAGS, "--additional-config", "--config")


def may_ask(command: Sequence[str]) -> bool:
    """Whether the process of this command line could ask for compression.

    A `vllm` command can by its arguments alone; any other program can at any time.
    """
    program = PurePath(command[0] if command else "")
    is_vllm = program.name == "vllm" or "entrypoints" in program.parts
    words = (word.replace("_", "-") for word in command[1:])
    return not is_vllm or any(word.startswith(_MAY_HOLD_IT) for word in words)


def refuse(reason: str) -> list[Step]:
    """From now on refuse, with `reason`, whoever asks for compression.

    Returns:
        The steps made; `changes.undo_all` takes them back.
    """

    class Refuse(argparse.Action):
        def __call__(self, *args: Any, **kwargs: Any) -> None:
            raise argparse.ArgumentError(self, reason)

    def add_cli_args(original: Any) -> Any:
        def wrapper(parser: Any, *args: Any, **kwargs: Any) -> Any:
            parser = original(parser, *args, **kwargs)
            with contained("adding the flags of KV compression"):
                add_flags(parser, Refuse, help=argparse.SUPPRESS)
            return parser

        return wrapper

    def create_engine_config(original: Any) -> Any:
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            if asks_for_compression(self):
                raise UnsupportedError(reason)
            return original(self, *args, **kwargs)

        return wrapper

    steps: list[Step] = []
    engine_args = "vllm.engine.arg_utils:EngineArgs"
    for name, wrapper in (
        ("add_cli_args", add_cli_args),
        ("create_engine_config", create_engine_config),
    ):
        try:
            steps += make_all([Wrap(f"{engine_args}.{name}", wrapper, takes=())])
        except Misfit:
            continue  # without the flags vLLM's parser refuses them by itself
    return steps
