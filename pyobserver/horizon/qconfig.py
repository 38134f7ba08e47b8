"""Which fake-quantizes a model gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .dtypes import QuantDType, qint8
from .fake_quantize import FakeQuantize
from .observers import HistogramObserver, MinMaxObserver

Factory = Callable[..., FakeQuantize]


@dataclass(frozen=True)
class QConfig:
    """The fake-quantizes of weights, of results, and of a model's inputs.

    Args:
        weight, output: a class or ``with_args`` factory of :class:`FakeQuantize`.
        input: that of the tensors that enter the quantized part; None: ``output``.

    Raises:
        TypeError: no class or factory of fake-quantizes.
    """

    weight: Factory
    output: Factory
    input: Factory | None = None

    def __post_init__(self) -> None:
        for role in ("weight", "output", "input"):
            factory = getattr(self, role)
            if role == "input" and factory is None:
                continue
            if not callable(factory) or isinstance(factory, torch.nn.Module):
                raise TypeError(
                    f"QConfig: {role}: expected a class or factory of FakeQuantize, got {factory!r}"
                )
            made = factory()
            if not isinstance(made, FakeQuantize):
                raise TypeError(
                    f"QConfig: {role}: expected a class or factory of FakeQuantize, "
                    f"got one of {type(made).__name__}"
                )


def get_qconfig(
    observer: Any = HistogramObserver,
    weight_dtype: QuantDType | torch.dtype = qint8,
    out_dtype: QuantDType | torch.dtype = qint8,
) -> QConfig:
    """Results per tensor by ``observer``; weights per output channel by their range.

    Args:
        observer: a class or factory of Horizon's observers, for results.
        weight_dtype, out_dtype: the types of weights and of results.

    The range of a weight is that of its present values (``averaging_constant=1``), so that it
    follows training.
    """
    return QConfig(
        weight=FakeQuantize.with_args(
            observer=MinMaxObserver,
            averaging_constant=1.0,
            dtype=weight_dtype,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        ),
        output=FakeQuantize.with_args(observer=observer, dtype=out_dtype),
    )
