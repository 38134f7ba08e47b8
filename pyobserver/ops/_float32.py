"""Rounding of Python's numbers to float32, for the ops that compute on the host."""

from __future__ import annotations

import torch


def to_float32(value: float) -> float:
    """The float32 nearest to ``value``, infinite beyond the greatest one."""
    return torch.tensor(value, dtype=torch.float32).item()
