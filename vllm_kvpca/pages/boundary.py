"""Which tokens of a sequence are archived: one pure function of its length.

Scheduler and worker call the same function, so they never exchange state about it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvpca.errors import OptionsError

DEFAULT_COMPRESS_AFTER = 512
DEFAULT_KEEP_RECENT = 256


def boundary(n: int, compress_after: int, keep_recent: int, align: int) -> int:
    """Number of leading tokens that are archived in a sequence of `n` computed tokens.

    Tokens [0, boundary) are archived, [boundary, n) are raw. The result is a multiple
    of `align`, never decreases with `n`, and leaves at least `keep_recent` tokens raw.
    """
    if n <= compress_after:
        return 0
    return max(0, (n - keep_recent) // align * align)


def boundaries(n: torch.Tensor, compress_after: int, keep_recent: int, align: int) -> torch.Tensor:
    """`boundary` for an integer tensor of lengths, element by element."""
    steps = torch.div(n - keep_recent, align, rounding_mode="floor") * align
    return torch.where(n > compress_after, steps.clamp_min(0), torch.zeros_like(n))


@dataclass(frozen=True)
class Policy:
    """The user's two thresholds and the granularity that the page layout imposes.

    Attributes:
        compress_after: tokens; a sequence this long or shorter stays raw.
        keep_recent: tokens at the end of a longer sequence that stay raw.
        align: tokens; the boundary moves in steps of this size.

    Raises:
        OptionsError: negative values, or keep_recent above compress_after.
    """

    compress_after: int
    keep_recent: int
    align: int = 1

    def __post_init__(self) -> None:
        for name in ("compress_after", "keep_recent"):
            value = getattr(self, name)
            if value < 0:
                flag = name.replace("_", "-")
                raise OptionsError(f"{name} is {value}: give --kv-{flag} a value of 0 or more.")
        if self.keep_recent > self.compress_after:
            raise OptionsError(
                f"keep_recent ({self.keep_recent}) exceeds compress_after "
                f"({self.compress_after}): a sequence would be compressed before it has that "
                "many tokens. Lower --kv-keep-recent or raise --kv-compress-after."
            )
        if self.align < 1:
            raise OptionsError(f"align is {self.align}: it must be at least 1.")

    def boundary(self, n: int) -> int:
        """Archived tokens of a sequence with `n` computed tokens."""
        return boundary(n, self.compress_after, self.keep_recent, self.align)

    def boundaries(self, n: torch.Tensor) -> torch.Tensor:
        """Archived tokens for an integer tensor of lengths."""
        return boundaries(n, self.compress_after, self.keep_recent, self.align)
