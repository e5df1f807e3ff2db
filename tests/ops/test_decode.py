"""The Triton decode kernels without a GPU: results in Triton's interpreter, and compilation.

The interpreter is chosen when a kernel is defined, so everything runs in one child process
with TRITON_INTERPRET=1. Inline assembly and bfloat16 dot products do not run there; the
kernels then use plain operations in float32. tests/gpu/check_decode.py checks the rest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_kvpca.errors import UnsupportedError
from vllm_kvpca.ops.attend.pieces import MAX_GROUP, check_tiles, row_count

pytest.importorskip("triton")

WORKER = Path(__file__).parents[1] / "gpu" / "check_decode.py"
FORMATS = ["raw", "k8v8", "k8v4", "v-mixed", "v-rank-int8", "k-mixed"]

# (start, recent) of each sequence; None is a row of padding.
MIXED = ([0, 0, 96, 144, 0], [0, 17, 0, 63, None])
SINGLE = ([0, 0, 0, 0, 0], [0, 15, 16, 62, 999])
ARCHIVED = ([16, 48, 1008], [0, 0, 0])

CASES = {
    **{f"{f}-64": (f, 64, 7, "float16", None, *MIXED) for f in FORMATS},
    **{f"{f}-{d}": (f, d, 3, "float16", None, [96], [5]) for f in FORMATS for d in (96, 128, 256)},
    **{f"{f}-bf16": (f, 64, 4, "bfloat16", None, [96], [17]) for f in FORMATS},
    **{f"group-{g}": ("k8v4", 64, g, "float16", None, *MIXED) for g in (1, 3, 8, 9, 16)},
    **{f"cap-{f}": (f, 64, 2, "float16", 5.0, [96], [17]) for f in FORMATS},
    "recent-only": ("k8v4", 64, 2, "float16", None, *SINGLE),
    "archive-only": ("k8v4", 64, 2, "float16", None, *ARCHIVED),
    "many-sequences": ("k-mixed", 64, 2, "float16", None, [48] * 17, [1] * 17),
    "padding-only": ("k8v4", 64, 2, "float16", None, [0, 0], [None, None]),
}

# The output is rounded to its dtype: 2^-11 (float16) or 2^-8 at most (the interpreter
# truncates bfloat16), a third of that in the RMS. The query in two int8 terms adds 2^-16 of
# its largest component, raised by the scores' size: below 1e-4 here.
LIMIT = {"float16": 5e-4, "bfloat16": 4e-3}


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), "interpret:" + json.dumps(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[0])


@pytest.mark.parametrize("name", list(CASES))
def test_matches_the_reference(errors, name):
    """Pages and buffers hold NaN wherever nothing was written; NaN fails the comparison."""
    assert errors[name] < LIMIT[CASES[name][3]]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", ["k8v4"])
def test_compiles_for(capability, name):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(WORKER), f"compile:{name},{capability}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_blocks_smaller_than_a_tile_are_refused_with_the_way_out():
    with pytest.raises(UnsupportedError, match="--block-size 32 or more"):
        check_tiles(16, 32)


def test_too_many_query_heads_are_refused_with_the_way_out():
    with pytest.raises(UnsupportedError, match="without --kv-compression-preset"):
        row_count(MAX_GROUP + 1)
