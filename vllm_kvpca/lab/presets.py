"""What a preset stores, for records and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_kvpca.calibration.collect import AttentionShape
from vllm_kvpca.lab.engine import STOCK
from vllm_kvpca.preset import load_preset


def label(preset: str) -> str:
    """A preset's short name: the last part of its name or folder."""
    return Path(preset).name


def facts(preset: str, model: str) -> dict[str, Any]:
    """Format and ratios of a preset on a model, from the page layout.

    Returns:
        preset, format; total_ratio: raw over archived bytes of K and V, scales included;
        v_ratio: the same of V alone. Stock has ratios of 1.
    """
    if preset == STOCK:
        return {"preset": STOCK, "format": STOCK, "total_ratio": 1.0, "v_ratio": 1.0}
    loaded = load_preset(preset)
    layout = loaded.layout(head_dim(model))
    return {
        "preset": label(preset),
        "format": loaded.config.format,
        "total_ratio": layout.total_ratio,
        "v_ratio": layout.v_ratio,
    }


def head_dim(model: str) -> int:
    return _head_dim(_config(model))


def attention_shape(model: str) -> AttentionShape:
    """Layers and heads by the configuration alone, for models of full attention only."""
    config = _config(model)
    layers = config.num_hidden_layers
    heads = config.num_key_value_heads
    return AttentionShape(layers, heads, _head_dim(config), tuple(range(layers)))


def _config(model: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).get_text_config()


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
