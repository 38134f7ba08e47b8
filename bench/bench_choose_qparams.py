"""The ``choose_qparams`` op against torch.ao's arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.ao.quantization import PerChannelMinMaxObserver

from pyobserver.ops import choose_qparams

from .cases import Call, Case, contenders, normal

_QSCHEMES = {
    "affine": torch.per_channel_affine,
    "symmetric": torch.per_channel_symmetric,
}


def _case(mapping: str) -> Case:
    def make(size: int, device: str) -> dict[str, Call]:
        high = normal((size,), device).abs()
        low = -0.5 * high
        observer = PerChannelMinMaxObserver(qscheme=_QSCHEMES[mapping], dtype=torch.qint8)
        observer.to(device)

        def ours() -> Call:
            scale = torch.empty_like(high)
            zero_point = torch.empty_like(high, dtype=torch.int32)
            return lambda: choose_qparams(
                low, high, scale, zero_point, observer.eps, -128, 127, mapping
            )

        return contenders(device, lambda: observer._calculate_qparams(low, high), ours)

    return Case(f"choose_qparams, {mapping}", make, sizes=(1, 1000), unit="ranges")


CASES = [_case(mapping) for mapping in _QSCHEMES]


def test_choose_qparams(benchmark: Callable[[Call], object], contender: Call) -> None:
    benchmark(contender)
