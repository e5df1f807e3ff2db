"""The model that is calibrated: loaded for forward passes, and its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_kvpca.calibration.collect import AttentionShape
from vllm_kvpca.errors import CalibrationError
from vllm_kvpca.preset.weights import NotComparable, WeightSamples, of_model


def load(model: str, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """Tokenizer and model of transformers, in evaluation mode.

    Args:
        model: folder or Hub name.
        device: of PyTorch; "auto" is a GPU if there is one.
        dtype: "auto" is the checkpoint's own on a GPU, and float32 on a CPU: most CPUs compute in
            bfloat16 slowly, and all round more.

    Raises:
        CalibrationError: there is no such model, or a file of it is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one bar at a time
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CalibrationError(
            f"{model!r} cannot be loaded: {reason} Give --model a folder of a transformers model "
            "or a Hub name org/name."
        ) from error
    return tokenizer, network.to(device).eval()


def samples_of(network: Any, shape: AttentionShape, quantized: str = "") -> WeightSamples | None:
    """Samples by which a preset knows the model again; None where its weights have other names
    than k_proj and v_proj, or are quantized: the name then has to do.

    Args:
        quantized: how the weights were quantized before they were unpacked.
    """
    try:
        return of_model(network, shape.layers, shape.num_kv_heads * shape.head_dim, quantized)
    except NotComparable:
        return None


def name_of(model: str) -> str:
    """A Hub name as it is; of a folder its last part."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model
