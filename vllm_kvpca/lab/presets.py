"""Presets as measurements need them: checked against the model, described, or with random bases."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from vllm_kvpca.calibration.collect import AttentionShape
from vllm_kvpca.calibration.fit import preset_config
from vllm_kvpca.codec.threads import one_thread
from vllm_kvpca.errors import OptionsError
from vllm_kvpca.lab.engine import STOCK
from vllm_kvpca.lab.peers import PEERS
from vllm_kvpca.lab.peers import ratios as peer_ratios
from vllm_kvpca.preset import Preset, load_preset
from vllm_kvpca.preset.identity import Served

RANDOM_CARD = (
    "# {name}\n\nBases are random: for measuring speed and capacity, of no use to a model.\n"
)


def check(names: Iterable[str], model: str, peers: bool = False) -> None:
    """Refuse what no engine would serve, before the first one starts.

    Args:
        names: presets; see preset.load_preset.
        model: folder with a config.json, or Hub name.
        peers: whether names of peers.PEERS are taken, too.

    Raises:
        PresetError: there is no such preset, it is damaged, or it was made for another model.
        LayoutError: its bands do not fit the model's heads.
        OptionsError: the model's configuration cannot be read.
    """
    shape = shape_of(model)
    layers = _config(model).num_hidden_layers
    for name in names:
        if peers and name in PEERS:
            continue
        preset = load_preset(name)
        heads = (shape.num_kv_heads, shape.head_dim)
        preset.check_shape(layers, *heads, list(shape.layers))
        preset.check_weights(Served(model))
        preset.layout(shape.head_dim)


def label(preset: str) -> str:
    """A preset's short name: the last part of its name or folder."""
    return Path(preset).name


def facts(preset: str, model: str) -> dict[str, Any]:
    """Format and ratios of a preset on a model, from the page layout.

    Returns:
        preset, format; total_ratio: raw over archived bytes of K and V, scales included;
        v_ratio: the same of V alone. Stock has ratios of 1.
    """
    if preset in PEERS:
        total, v = peer_ratios(preset, head_dim(model))
        kind = PEERS[preset].kv_cache_dtype
        return {"preset": preset, "format": kind, "total_ratio": total, "v_ratio": v}
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


def random_preset(format: str, model: str, shape: AttentionShape, seed: int = 0) -> Preset:
    """A preset of a calibrated format with random orthonormal bases: speed and capacity do not
    depend on what is in a basis.

    Args:
        format: one of CALIBRATED_FORMATS.
        model: name of the model it is for.
        shape: the model's layers and heads.

    Raises:
        CalibrationError: the format's bands do not fit the heads.
    """
    config = preset_config(format, model, None, shape)
    generator = torch.Generator().manual_seed(seed)
    size = (len(shape.layers), shape.num_kv_heads, shape.head_dim, shape.head_dim)
    with one_thread():
        bases = {
            which: torch.linalg.qr(torch.randn(size, generator=generator)).Q
            for which in "kv"
            if getattr(config, which).calibrated
        }
    return Preset(format, config, bases)


def head_dim(model: str) -> int:
    return _head_dim(_config(model))


def attention_heads(model: str) -> tuple[int, int, int]:
    """Query heads, KV heads and head_dim."""
    shape = shape_of(model)
    return _config(model).num_attention_heads, shape.num_kv_heads, shape.head_dim


def sequences_that_fit(model: str, kv_gib: float, tokens: int, dtype: str = "auto") -> int:
    """How many sequences of a length stock's KV cache holds at least, one or more.

    Every layer counts as one of full attention, so it may be more.
    """
    shape = shape_of(model)
    number = 4 if dtype == "float32" else 2
    per_token = shape.num_layers * shape.num_kv_heads * shape.head_dim * 2 * number
    blocks = -(-tokens // 128) * 128  # whole blocks, of any size that vLLM takes
    return max(1, int(kv_gib * 2**30) // (per_token * blocks))


def shape_of(model: str) -> AttentionShape:
    """Layers with full attention and their heads, by the configuration alone."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    config = _config(model)
    kinds = [type(layer) for layer in DynamicCache(config=config).layers]
    # Without layers of several kinds transformers makes them as they are needed.
    full = [i for i, kind in enumerate(kinds) if kind is DynamicLayer]
    layers = full if kinds else list(range(config.num_hidden_layers))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return AttentionShape(config.num_hidden_layers, heads, _head_dim(config), tuple(layers))


def _config(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OptionsError(
            f"the configuration of --model {model} cannot be read ({reason}): give a folder with a "
            "config.json, or the Hub name of a model that vLLM serves."
        ) from error


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
