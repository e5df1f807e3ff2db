"""`GET /kv_compression`: what is compressed, how, and the figures of this moment.

An endpoint plugin: vLLM loads it only where VLLM_PLUGINS names `kvpca`.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, Field, create_model

from vllm_kvpca.metrics import METRICS, Metric
from vllm_kvpca.preset import Preset, TensorFormat
from vllm_kvpca.serving.settings.options import CompressionOptions, cached_preset

PATH = "/kv_compression"

_LEFT_TO_VLLM = {
    "SlidingWindowSpec": "a sliding window already keeps only the tokens it needs",
    "ChunkedLocalAttentionSpec": "chunked attention already keeps only the tokens it needs",
    "MambaSpec": "a state of fixed size, no keys and values",
    "CrossAttentionSpec": "cross attention is written once and not per token",
}


class Layers(BaseModel):
    """Layers of one kind."""

    kind: str = Field(description="Kind of layer, by its cache: full attention, SlidingWindow, ...")
    compressed: bool
    count: int
    names: list[str]
    reason: str | None = Field(description="Why these layers are left to vLLM.")


class StoredBand(BaseModel):
    """A run of components with one bit width and one scale per token."""

    components: int
    bits: int


class Stored(BaseModel):
    """How K or V is archived."""

    basis: str
    bands: list[StoredBand]


class Layout(BaseModel):
    """Bytes and tokens of pages. Bytes are those of one tensor-parallel rank."""

    head_dim: int
    kv_heads: int = Field(description="KV heads on one rank.")
    k: Stored
    v: Stored
    raw_token_bytes: int = Field(description="One raw token and head: K and V.")
    archived_token_bytes: int = Field(description="One archived token and head, with scales.")
    total_ratio: float = Field(description="raw_token_bytes / archived_token_bytes.")
    raw_block_tokens: int
    archive_block_tokens: int
    page_bytes: int = Field(description="One block of either kind in one layer.")


def _figure(metric: Metric) -> tuple[Any, Any]:
    text = f"{metric.help} Unit: {metric.unit}."
    parts = ("count", "sum") if metric.kind == "histogram" else metric.states
    if not parts:
        return float, Field(description=text)
    fields: dict[str, Any] = dict.fromkeys(parts, (float, ...))
    return create_model(metric.key, **fields), Field(description=text)


_SHOWN = [metric for metric in METRICS if metric.key != "preset_info"]
_figures: dict[str, Any] = {metric.key: _figure(metric) for metric in _SHOWN}
Figures = create_model(
    "Figures", __doc__="The metrics of /metrics, by their names without `kvpca_`.", **_figures
)


class Engine(BaseModel):
    """One data-parallel engine."""

    engine: int
    figures: Figures  # type: ignore[valid-type]


class KvCompression(BaseModel):
    """The answer of `GET /kv_compression`."""

    model_name: str
    preset: str
    format: str
    compress_after: int = Field(description="Sequences of at most this many tokens stay raw.")
    keep_recent: int = Field(description="Tokens at the end of longer sequences that stay raw.")
    step: int = Field(description="Tokens are archived in steps of this many.")
    layers: list[Layers]
    layout: Layout
    engines: list[Engine]


def _api_keys(app: FastAPI) -> list[str]:
    """The server's keys, as vLLM's own middleware finds them."""
    from vllm import envs

    given = getattr(app.state.args, "api_key", None)
    return [key for key in (given or [envs.VLLM_API_KEY]) if key]


async def _authenticate(
    request: Request,
    shown: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
) -> None:
    """vLLM's middleware guards its own path prefixes only, so the route asks it itself."""
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    keys = _api_keys(request.app)
    if keys and not AuthenticationMiddleware(request.app, keys).verify_token(request.headers):
        raise HTTPException(401, "Unauthorized", headers={"WWW-Authenticate": "Bearer"})


router = APIRouter(dependencies=[Depends(_authenticate)], tags=["KV compression"])


@router.get(
    PATH,
    response_model=KvCompression,
    responses={
        401: {"description": "The server has an API key and the request lacks it."},
        404: {"description": "The server does not compress."},
    },
)
async def kv_compression(request: Request) -> Any:
    """What is compressed, how, and the figures of this moment."""
    client = request.app.state.kvpca_engine_client
    options = None if client is None else CompressionOptions.of(client.vllm_config)
    if options is None:
        raise HTTPException(
            404, "This server does not compress: start it with --kv-compression-preset."
        )
    engines = await client.engine_core.call_utility_all_async("kvpca_status")
    ranks = client.engine_core.engine_ranks_managed
    served = client.vllm_config.model_config.served_model_name
    name = served if isinstance(served, str) else served[0]
    by_rank = dict(zip(ranks, engines, strict=True))
    return answer(name, options, cached_preset(options.preset), by_rank)


def answer(
    model_name: str, options: CompressionOptions, preset: Preset, engines: dict[int, dict]
) -> KvCompression:
    """The answer from the options and each engine's `stats.engine_status`."""
    status = next(iter(engines.values()))
    head_dim = status["head_dim"]
    layout = preset.layout(head_dim)
    raw = 4 * head_dim
    return KvCompression(
        model_name=model_name,
        preset=preset.name,
        format=preset.config.format,
        compress_after=options.compress_after,
        keep_recent=options.keep_recent,
        step=status["step"],
        layers=[_layers(**group) for group in status["layers"]],
        layout=Layout(
            head_dim=head_dim,
            kv_heads=status["kv_heads"],
            k=_stored(preset.config.k, head_dim),
            v=_stored(preset.config.v, head_dim),
            raw_token_bytes=raw,
            archived_token_bytes=layout.content_bytes,
            total_ratio=raw / layout.content_bytes,
            raw_block_tokens=status["raw_block"],
            archive_block_tokens=status["archive_block"],
            page_bytes=status["page_bytes"],
        ),
        engines=[
            Engine(engine=index, figures=Figures(**nested(one["figures"])))
            for index, one in engines.items()
        ],
    )


def _layers(kind: str, names: list[str]) -> Layers:
    if kind == "RecentSpec":
        return Layers(
            kind="full attention", compressed=True, count=len(names), names=names, reason=None
        )
    reason = _LEFT_TO_VLLM.get(kind, "no plain full attention")
    shown = kind.removesuffix("Spec")
    return Layers(kind=shown, compressed=False, count=len(names), names=names, reason=reason)


def _stored(stored: TensorFormat, head_dim: int) -> Stored:
    bands = [StoredBand(components=band.width, bits=band.bits) for band in stored.resolve(head_dim)]
    return Stored(basis=stored.basis, bands=bands)


def nested(figures: dict[str, float]) -> dict[str, Any]:
    """{"a/b": 1} as {"a": {"b": 1}}."""
    nested: dict[str, Any] = {}
    for path, value in figures.items():
        key, _, part = path.partition("/")
        if part:
            nested.setdefault(key, {})[part] = value
        else:
            nested[key] = value
    return nested


class KvCompressionEndpoint:
    """The object vLLM asks for: entry point `kvpca` of the group `vllm.endpoint_plugins`."""

    name = "kvpca"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        state.kvpca_engine_client = engine_client
