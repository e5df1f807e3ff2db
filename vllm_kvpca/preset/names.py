"""Whether two names mean the same model, or one architecture."""

from __future__ import annotations

import re


def same_model(expected: str, served: str) -> bool:
    """Whether a served name or path means the model a preset was calibrated for.

    Only the last part is compared, so that a local copy of a Hub model is accepted.
    """

    return _last(expected) == _last(served)


def same_family(expected: str, served: str) -> bool:
    """Whether a served name is a variant of a model: "Qwen2.5-7B-Instruct" of "Qwen2.5-7B".

    For presets without calibration, which depend on the architecture and not on the weights.
    """
    pattern = rf"(^|[-_.]){re.escape(_last(expected))}($|[-_.])"
    return re.search(pattern, _last(served)) is not None


def _last(name: str) -> str:
    return name.rstrip("/").replace("--", "/").rsplit("/", 1)[-1].lower()
