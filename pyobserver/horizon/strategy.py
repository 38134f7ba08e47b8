"""Which scales are allowed, and how one is made of another."""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from ..ranges import SEARCHES, constrained


class ComputeScaleStrategy(enum.Enum):
    """Which scales are allowed.

    * ``STATISTIC``: any.
    * ``POT``: powers of two; of another scale, ``2 ** ceil(log2(scale))``.
    * ``KPOT``: powers of two as well; of another scale the nearest by its exponent,
      ``2 ** round(log2(scale))``, which clips by up to a factor of the square root of two where
      POT clips nothing. Horizon names it the trainable power of two and does not publish it; this
      is the rounding of a learned exponent, which a straight-through gradient passes without bias
      (as of the thresholds of Jain et al., "Trained Quantization Thresholds", 2019, with nearest
      for up).
    * ``FP16``: scales that float16 holds; of another scale, the nearest that is not zero.

    A method that searches for the least error (mse, lp) searches among the scales that are
    allowed; the scale of any other is made one afterwards.
    """

    STATISTIC = "none"
    POT = "power_of_two"
    KPOT = "nearest_power_of_two"
    FP16 = "fp16"

    def __repr__(self) -> str:
        return f"ComputeScaleStrategy.{self.name}"


def allowed_scale(scale: Tensor, strategy: ComputeScaleStrategy) -> Tensor:
    """The scale made one that the strategy allows; one that is allowed already stays.

    Args:
        scale: float32, positive, any shape.
        strategy: see :class:`ComputeScaleStrategy`.
    """
    if strategy is ComputeScaleStrategy.KPOT:
        exponent = torch.round(torch.log2(scale)).clamp(-126, 127)
        return torch.ldexp(torch.ones_like(scale), exponent.int())
    return constrained(scale, strategy.value)


def searched_constraint(strategy: ComputeScaleStrategy, method: str) -> str:
    """The constraint of :mod:`pyobserver.ranges` under which a method chooses."""
    if strategy is not ComputeScaleStrategy.KPOT:
        return strategy.value
    searches = method in SEARCHES
    return ComputeScaleStrategy.POT.value if searches else ComputeScaleStrategy.STATISTIC.value
