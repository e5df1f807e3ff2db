"""Every place where vLLM is changed from outside, and what each waits for.

Each function is applied once per class however often the plugin is loaded. Nothing here
has an effect unless an engine asks for KV compression.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from vllm_kvpca.preset.formats import AUTO
from vllm_kvpca.serving.settings.options import (
    DEFAULT_COMPRESS_AFTER,
    DEFAULT_KEEP_RECENT,
    KEY,
    CompressionOptions,
    cached_preset,
    check_engine,
)

BACKEND_KIND = "full_attention"


def apply() -> None:
    """Apply all of them; safe to call again."""
    for change in (
        add_flags,
        select_backend,
        allow_backend_on_cpu,
        carry_cache_stats,
        send_first_stats,
        fetch_archive_times,
        add_status_method,
        add_stat_logger,
    ):
        change()


def _wrap_once(
    owner: type, name: str, make: Callable[[Any], Any], kind: type | None = None
) -> None:
    """Replace owner.name by make(original), once."""
    current = owner.__dict__[name]
    function = getattr(current, "__func__", current)
    if hasattr(function, "_kvpca"):
        return
    wrapper: Any = functools.wraps(function)(make(function))
    wrapper._kvpca = True
    setattr(owner, name, kind(wrapper) if kind else wrapper)


# -- flags: waits for a way to add engine arguments from a general plugin ----------------


class _StoreOption(argparse.Action):
    """Keeps a flag in `additional_config` at once: further API-server processes get the
    parsed namespace and run vLLM's own `from_cli_args`."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.additional_config = _with_flags(namespace, namespace.additional_config)


_FLAGS: dict[str, str] = {
    "kv_compression_preset": "preset",
    "kv_compress_after": "compress_after",
    "kv_keep_recent": "keep_recent",
}


def _with_flags(namespace: Any, additional_config: Any) -> dict[str, Any]:
    config = dict(additional_config or {})
    flags = {key: getattr(namespace, dest, None) for dest, key in _FLAGS.items()}
    flags = {key: value for key, value in flags.items() if value is not None}
    if flags:
        config[KEY] = {**(config.get(KEY) or {}), **flags}
    return config


def add_flags() -> None:
    """`vllm serve --kv-compression-preset ... --kv-compress-after ... --kv-keep-recent ...`"""
    from vllm.engine.arg_utils import EngineArgs

    def add_cli_args(original: Any) -> Any:
        def wrapper(parser: Any) -> Any:
            parser = original(parser)
            group = parser.add_argument_group(
                title="KV compression",
                description="vllm-kvpca: store the KV cache of full-attention layers compressed.",
            )
            group.add_argument(
                "--kv-compression-preset",
                action=_StoreOption,
                default=argparse.SUPPRESS,
                metavar="NAME_OR_PATH",
                help="A shipped preset (`vllm-kvpca presets` lists them), a preset folder, or a "
                "Hub repository, or auto. Without it nothing is compressed.",
            )
            group.add_argument(
                "--kv-compress-after",
                action=_StoreOption,
                default=argparse.SUPPRESS,
                type=int,
                metavar="TOKENS",
                help="Sequences of at most this many tokens stay raw "
                f"(default: {DEFAULT_COMPRESS_AFTER}).",
            )
            group.add_argument(
                "--kv-keep-recent",
                action=_StoreOption,
                default=argparse.SUPPRESS,
                type=int,
                metavar="TOKENS",
                help="Tokens at the end of a longer sequence that stay raw "
                f"(default: {DEFAULT_KEEP_RECENT}).",
            )
            return parser

        return wrapper

    def from_cli_args(original: Any) -> Any:
        def wrapper(cls: Any, args: Any) -> Any:
            # A later --additional-config on the command line would have dropped our key.
            engine_args = original(cls, args)
            engine_args.additional_config = _with_flags(args, engine_args.additional_config)
            return engine_args

        return wrapper

    _wrap_once(EngineArgs, "add_cli_args", add_cli_args, staticmethod)
    _wrap_once(EngineArgs, "from_cli_args", from_cli_args, classmethod)


# -- backend choice: waits for a config hook for general plugins -------------------------


def select_backend() -> None:
    """Route full-attention layers to our backend, and refuse what cannot be compressed."""
    from vllm.engine.arg_utils import EngineArgs

    def create_engine_config(original: Any) -> Any:
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            values = (self.additional_config or {}).get(KEY)
            if values is None:
                return original(self, *args, **kwargs)
            served = self.served_model_name
            names = [self.model, *([served] if isinstance(served, str) else served or [])]
            options = CompressionOptions.parse(values)
            if options.preset == AUTO:
                options = options.resolved(names, _text_config(self))
            preset = cached_preset(options.preset)
            self.additional_config = {**self.additional_config, KEY: options.model_dump()}
            _use_our_backend(self.attention_config)
            config = original(self, *args, **kwargs)
            check_engine(config, preset)
            return config

        return wrapper

    _wrap_once(EngineArgs, "create_engine_config", create_engine_config)


def _text_config(engine_args: Any) -> Any:
    """The model's configuration, before vLLM reads it; None where it cannot be read: vLLM says
    why in a moment."""
    from vllm.transformers_utils.config import get_config

    args = engine_args
    try:
        config = get_config(
            args.hf_config_path or args.model,
            args.trust_remote_code,
            args.revision,
            args.code_revision,
            args.config_format,
        )
    except Exception:
        return None
    return config.get_text_config()


def _use_our_backend(attention_config: Any) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    kinds = {**attention_config.backend_per_kind, BACKEND_KIND: AttentionBackendEnum.CUSTOM}
    attention_config.backend_per_kind = kinds


# -- CPU: waits for CpuPlatform.get_attn_backend_cls to honour a registered backend ------


def allow_backend_on_cpu() -> None:
    """vLLM's CPU platform answers CPU_ATTN whatever was selected; let ours through."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    def get_attn_backend_cls(original: Any) -> Any:
        def wrapper(
            cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **kw: Any
        ) -> Any:
            if selected_backend is not AttentionBackendEnum.CUSTOM:
                return original(cls, selected_backend, attn_selector_config, *args, **kw)
            reasons = selected_backend.get_class().validate_configuration(
                device_capability=None, **attn_selector_config._asdict()
            )
            if reasons:
                raise ValueError(
                    f"KV compression does not support this model: {', '.join(reasons)}. "
                    "Serve it without --kv-compression-preset."
                )
            return selected_backend.get_path()

        return wrapper

    _wrap_once(CpuPlatform, "get_attn_backend_cls", get_attn_backend_cls, classmethod)


# -- figures: waits for SchedulerStats to carry plugin data ------------------------------


def carry_cache_stats() -> None:
    """An optional field of SchedulerStats: vLLM's serializer then carries it along."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.metrics.stats import SchedulerStats

    if "kvpca" not in SchedulerStats.__dataclass_fields__:
        field: Any = dataclasses.field(default=None)
        field.name, field.type, field.kw_only = "kvpca", "dict[str, Any] | None", False
        field._field_type = dataclasses._FIELD  # type: ignore[attr-defined]
        SchedulerStats.kvpca = None
        SchedulerStats.__annotations__["kvpca"] = dict[str, Any] | None
        SchedulerStats.__dataclass_fields__["kvpca"] = field

    def make_stats(original: Any) -> Any:
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            stats = original(self, *args, **kwargs)
            if KEY in (self.vllm_config.additional_config or {}):
                from vllm_kvpca.serving.observe.stats import take_stats

                figures = take_stats(self)  # also without statistics: it empties its lists
                if stats is not None:
                    stats.kvpca = figures
            return stats

        return wrapper

    _wrap_once(Scheduler, "make_stats", make_stats)


# -- first figures: waits for vLLM to send statistics before the first step --------------


def send_first_stats() -> None:
    """Figures from the start: vLLM sends statistics only with the first step, and until then
    dashboards would lack every series."""
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.engine.core import DPEngineCoreProc, EngineCoreProc

    def run_busy_loop(original: Any) -> Any:
        def wrapper(self: Any) -> Any:
            if KEY in (self.vllm_config.additional_config or {}):
                _fetch_archive_times(self)
                stats = self.scheduler.make_stats()
                if stats is not None:
                    self.output_queue.put_nowait((0, EngineCoreOutputs(scheduler_stats=stats)))
            return original(self)

        return wrapper

    for owner in (EngineCoreProc, DPEngineCoreProc):
        _wrap_once(owner, "run_busy_loop", run_busy_loop)


# -- archive times: waits for a place where a scheduler may ask the workers -----------------


def fetch_archive_times() -> None:
    """Every engine that keeps statistics asks its workers now and then how long archiving took.

    This is for engines within the process. One in a process of its own loads plugins only while
    it is initialized: there `send_first_stats` does it.
    """
    from vllm.v1.engine.core import EngineCore

    def init(original: Any) -> Any:
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if KEY in (self.vllm_config.additional_config or {}):
                _fetch_archive_times(self)

        return wrapper

    _wrap_once(EngineCore, "__init__", init)


def _fetch_archive_times(engine: Any) -> None:
    from vllm_kvpca.serving.observe.stats import Sent
    from vllm_kvpca.serving.observe.times import SampleFetcher

    if engine.log_stats:
        Sent.of(engine.scheduler).samples = SampleFetcher(engine.model_executor)


# -- status: waits for a way to ask the scheduler, and not only workers, from a route -----


def add_status_method() -> None:
    """`GET /kv_compression` asks the engine by this method, as vLLM's own routes do by theirs."""
    from vllm.v1.engine.core import EngineCore

    def kvpca_status(self: Any) -> Any:
        from vllm_kvpca.serving.observe.stats import engine_status

        return engine_status(self.scheduler)

    EngineCore.kvpca_status = kvpca_status


# -- stat logger: waits for stat-logger plugins that do not switch statistics on ---------


def add_stat_logger() -> None:
    """Add our stat logger to engines that compress.

    vLLM has an entry point for stat loggers, but a logger found there overrules
    --disable-log-stats in every engine, compressed or not.
    """
    from vllm.v1.metrics.loggers import StatLoggerManager

    def init(original: Any) -> Any:
        def wrapper(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            original(self, vllm_config, *args, **kwargs)
            if KEY in (vllm_config.additional_config or {}):
                from vllm_kvpca.serving.observe.stat_logger import KvpcaStatLogger

                self.stat_loggers.append(KvpcaStatLogger(vllm_config, self.engine_indexes))

        return wrapper

    _wrap_once(StatLoggerManager, "__init__", init)
