"""Observers of counts and a range: the least that declare how their buffers merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

import pyobserver as po
from pyobserver.observers import merging

COLUMNS = 64


class CountingObserver(po.UniformQuantizationObserverBase):
    """How many values have each whole part."""

    _merges: ClassVar[Mapping[str, str]] = {**merging.RUNNING, "counts": "sum"}
    counts: Tensor

    def __init__(self, qscheme: torch.qscheme = torch.per_tensor_affine):
        super().__init__(qscheme=qscheme)
        self._fill(() if qscheme == torch.per_tensor_affine else (0,))

    def _fill(self, size: tuple[int, ...]) -> None:
        self.register_buffer("counts", torch.zeros((*size, COLUMNS), dtype=torch.int64))
        self.register_buffer("min_val", torch.full(size, torch.inf))
        self.register_buffer("max_val", torch.full(size, -torch.inf))

    def observe(self, x: Tensor, enabled: Tensor | None = None) -> None:
        self._count(x.reshape(1, -1))

    def _count(self, rows: Tensor) -> None:
        column = (rows.floor() + COLUMNS // 2).clamp(0, COLUMNS - 1).long()
        self.counts.view(-1, COLUMNS).scatter_add_(1, column, torch.ones_like(column))
        self.min_val.copy_(torch.minimum(self.min_val, rows.amin(1).view_as(self.min_val)))
        self.max_val.copy_(torch.maximum(self.max_val, rows.amax(1).view_as(self.max_val)))


class PerChannelCountingObserver(CountingObserver):
    """How many values of each channel have each whole part; sized by the first tensor."""

    def __init__(self, ch_axis: int = 0):
        super().__init__(torch.per_channel_affine)
        self.ch_axis = ch_axis

    def observe(self, x: Tensor, enabled: Tensor | None = None) -> None:
        rows = x.movedim(self.ch_axis, 0).flatten(1)
        if self.counts.numel() == 0:
            self._fill((len(rows),))
        self._count(rows)
