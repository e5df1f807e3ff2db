"""What `config.json` of a preset may say. Unknown fields are refused.

Every number, list and string has a limit, well above any model that exists (the most layers are
126, of Llama 3.1 405B; the widest heads 576, MLA's latent with its RoPE key): a preset is
untrusted, and nothing may be allocated from a number before the number is checked.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)

from vllm_kvpca.codec.bands import Band, resolve_bands

MAX_LAYERS = 1024
MAX_KV_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_BANDS = 16
MAX_NAME = 256
"""Characters of a model's name or revision; the Hub allows fewer."""
MAX_DESCRIPTION = 4096


def _share(value: Any) -> Any:
    if isinstance(value, str):
        # Not left to Fraction: it takes "1/0" and "1e999999999" too.
        if not re.fullmatch(r"[0-9]{1,4}(/[1-9][0-9]{0,3})?", value):
            raise ValueError('a share is a fraction of head_dim such as "3/8"')
        return Fraction(value)
    if isinstance(value, Fraction | int) or (isinstance(value, float) and math.isfinite(value)):
        return Fraction(value)
    raise ValueError('a share is a fraction of head_dim such as "3/8"')


Share = Annotated[
    Fraction,
    BeforeValidator(_share),
    PlainSerializer(str, return_type=str),
]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BandSpec(_Strict):
    """A band as a share of head_dim, e.g. "3/8", and its bits per component."""

    share: Share = Field(gt=0, le=1)
    bits: Literal[16, 8, 4, 0]


class TensorFormat(_Strict):
    """How K or V is stored: a basis and the bands of its components.

    `identity` and `hadamard` need no calibration; `pca` (orthonormal) and `balanced` (K only, any
    invertible matrix; see codec.balanced_basis) come from basis.safetensors.
    """

    basis: Literal["identity", "hadamard", "pca", "balanced"]
    bands: tuple[BandSpec, ...] = Field(min_length=1, max_length=MAX_BANDS)
    without_bias: bool = False
    """K only: the model's bias is taken out first (codec.key_bias); it comes from
    basis.safetensors, too."""

    @model_validator(mode="after")
    def _check(self) -> TensorFormat:
        if sum((band.share for band in self.bands), Fraction(0)) != 1:
            raise ValueError("the shares of the bands must add up to 1")
        if any(band.bits == 16 for band in self.bands) and self.basis != "identity":
            raise ValueError('bands of 16 bits hold raw values: they need the basis "identity"')
        if all(band.bits == 0 for band in self.bands):
            raise ValueError("every band has 0 bits, so nothing would be stored")
        return self

    @property
    def calibrated(self) -> bool:
        """Whether the basis comes from basis.safetensors."""
        return self.basis in ("pca", "balanced")

    def resolve(self, head_dim: int) -> tuple[Band, ...]:
        """Bands with widths for one head dimension.

        Raises:
            LayoutError: the shares cannot be laid out for this head_dim.
        """
        return resolve_bands([(band.share, band.bits) for band in self.bands], head_dim)


class ModelShape(_Strict):
    """The model a calibrated preset was made for."""

    name: str = Field(max_length=MAX_NAME)
    revision: str | None = Field(default=None, max_length=MAX_NAME)
    num_layers: int = Field(gt=0, le=MAX_LAYERS)
    num_kv_heads: int = Field(gt=0, le=MAX_KV_HEADS)
    head_dim: int = Field(gt=0, le=MAX_HEAD_DIM)

    @property
    def width(self) -> int:
        """Rows of a layer's k_proj."""
        return self.num_kv_heads * self.head_dim


Layer = Annotated[int, Field(ge=0, lt=MAX_LAYERS)]


class PresetConfig(_Strict):
    """`config.json`: the format, and for calibrated presets the model it belongs to."""

    schema_version: Literal[1] = 1
    format: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)
    description: str = Field(default="", max_length=MAX_DESCRIPTION)
    k: TensorFormat
    v: TensorFormat
    model: ModelShape | None = None
    layers: tuple[Layer, ...] | None = Field(default=None, min_length=1, max_length=MAX_LAYERS)
    """Indices of the layers that have a basis, in the order of basis.safetensors; None: all."""

    @property
    def calibrated(self) -> bool:
        """Whether basis.safetensors is needed."""
        return self.k.calibrated or self.v.calibrated

    @property
    def covered(self) -> tuple[int, ...]:
        """Indices of the layers that have a basis."""
        assert self.model is not None
        return self.layers if self.layers is not None else tuple(range(self.model.num_layers))

    @model_validator(mode="after")
    def _check(self) -> PresetConfig:
        if self.layers is not None and self.model is not None:
            count = self.model.num_layers
            if len(set(self.layers)) < len(self.layers) or max(self.layers) >= count:
                raise ValueError(
                    f"layers {list(self.layers)} must be different indices below {count}"
                )
        if self.calibrated and self.model is None:
            raise ValueError('a fitted basis belongs to one model: the field "model" is missing')
        if self.v.without_bias:
            raise ValueError("without_bias is for K: V's bias is no larger than V")
        if self.k.without_bias and self.k.basis not in ("pca", "balanced"):
            raise ValueError("without_bias needs a fitted basis")
        if self.v.basis == "balanced":
            raise ValueError('the basis "balanced" is for K: V is not multiplied with queries')
        return self
