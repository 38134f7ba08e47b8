"""torchao's tutorial on static quantization, with the observers of pyobserver.

A small MLP on scikit-learn's digits: observers are inserted, calibrated, and the model converted
by torchao's ``quantize_``, to int8 with integer matrix products, and to uint8 as in the tutorial.
Prints the accuracy on the held-out half before and after, for each kind of observer.
"""

from __future__ import annotations

import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchao.quantization import quantize_
from torchao.quantization.granularity import PerAxis, PerTensor
from torchao.quantization.quant_primitives import MappingType

from pyobserver.compat.torchao import (
    AffineQuantizedHistogramObserver,
    AffineQuantizedLogHistogramObserver,
    AffineQuantizedMinMaxObserver,
    AffineQuantizedMovingAverageMinMaxObserver,
    Int8StaticConfig,
    ObservedLinear,
    StaticQuantConfig,
    insert_observers_,
)

OBSERVERS = (
    AffineQuantizedMinMaxObserver,
    AffineQuantizedMovingAverageMinMaxObserver,
    AffineQuantizedHistogramObserver,
    AffineQuantizedLogHistogramObserver,
)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and labels to train on, and the held-out half."""
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held_out = order.chunk(2)
    return x[train], y[train], x[held_out], y[held_out]


def trained_mlp(x: Tensor, y: Tensor) -> nn.Module:
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def observers(kind: type, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """One range for the activation, one for each row of the weight."""
    act_obs = kind(
        MappingType.ASYMMETRIC,
        dtype,
        granularity=PerTensor(),
        eps=torch.finfo(torch.float32).eps,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int32,
    )
    weight_obs = AffineQuantizedMinMaxObserver(
        # the integer products take symmetric weights
        MappingType.SYMMETRIC if dtype == torch.int8 else MappingType.ASYMMETRIC,
        dtype,
        granularity=PerAxis(axis=0),
        eps=torch.finfo(torch.float32).eps,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int32,
    )
    return act_obs, weight_obs


def quantized(model: nn.Module, kind: type, dtype: torch.dtype, batches: Tensor) -> nn.Module:
    """A copy of the model: observed, calibrated, converted."""
    model = copy.deepcopy(model)
    insert_observers_(model, *observers(kind, dtype))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    config = Int8StaticConfig() if dtype == torch.int8 else StaticQuantConfig(dtype)
    quantize_(model, config, lambda module, name: isinstance(module, ObservedLinear))
    return model


def main(device: str = "cpu") -> dict[str, float]:
    """The accuracies, by ``"float32"`` or the dtype and the kind of observer."""
    torch.manual_seed(0)
    x, y, held_out_x, held_out_y = (t.to(device) for t in digits())
    # trained on the CPU, so that the model is the same on every device
    model = trained_mlp(x.cpu(), y.cpu()).to(device)

    def accuracy(of: nn.Module) -> float:
        with torch.no_grad():
            return (of(held_out_x).argmax(1) == held_out_y).double().mean().item()

    found = {"float32": accuracy(model)}
    batches = x[:256].split(32)
    for dtype in (torch.int8, torch.uint8):
        for kind in OBSERVERS:
            name = f"{dtype} {kind.__name__}".removeprefix("torch.")
            found[name] = accuracy(quantized(model, kind, dtype, batches))
    for name, value in found.items():
        print(f"{name:50} {value:.2%}")
    return found


if __name__ == "__main__":
    main("cuda" if torch.cuda.is_available() else "cpu")
