"""What the extra `lab` brings, and what is said where it is missing."""

from __future__ import annotations

from importlib.util import find_spec

from vllm_kvpca.errors import SetupError, install_extra

_DISTRIBUTIONS = {"matplotlib": "matplotlib", "PIL": "pillow", "lm_eval": "lm-eval"}


def need(*modules: str) -> None:
    """Refuse where one of these modules is not installed.

    Raises:
        SetupError: with how to install them.
    """
    missing = [_DISTRIBUTIONS[module] for module in modules if find_spec(module) is None]
    if missing:
        verb = "are" if len(missing) > 1 else "is"
        raise SetupError(
            f"{' and '.join(missing)} {verb} not installed; install with: {install_extra('lab')}"
        )
