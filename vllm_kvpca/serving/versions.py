"""The versions of vLLM that vllm-kvpca is tested with: the one place that names them.

pyproject.toml's extras and the README repeat them; a test compares.
"""

from __future__ import annotations

import os

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

TESTED = SpecifierSet(">=0.32,<0.34")
ALLOW_UNTESTED = "KVPCA_ALLOW_UNTESTED_VLLM"
"""Environment variable; 1 lets another version be tried."""


def is_tested(version: str) -> bool:
    """Whether that version of vLLM is among the tested ones; a build without a version is not."""
    try:
        return TESTED.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def may_use(version: str) -> bool:
    """Whether that version is tested, or the user wants it tried all the same."""
    return is_tested(version) or os.environ.get(ALLOW_UNTESTED) == "1"


def shown_range() -> str:
    """The tested versions as pip takes them: vllm>=0.32,<0.34."""
    return "vllm" + ",".join(sorted(map(str, TESTED), reverse=True))
