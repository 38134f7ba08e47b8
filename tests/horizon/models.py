"""Small models with what preparing trips over, and example inputs for each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyobserver.horizon import DeQuantStub, QuantStub


def randomize_norms(model: nn.Module) -> nn.Module:
    """Batch norms with something to fold."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


class Functional(nn.Module):
    """Weights of functions, sums, products and matrix products; no stubs."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.matrix = nn.Parameter(torch.randn(5, 4))
        self.mixing = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.kernel, padding=1))
        x = x.mean((2, 3))
        x = F.linear(x, self.matrix)
        x = x @ self.mixing
        x = torch.relu(x + x.flip(0))
        return torch.matmul(x, x.transpose(0, 1)) * 0.5


class SeveralInputs(nn.Module):
    """Three inputs, one in a list and one of integers; results in a dict with a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.left = nn.Linear(4, 4)
        self.right = nn.Linear(4, 4)

    def forward(self, xs: list[Tensor], index: Tensor, bias: Tensor, mask: Any = None) -> Any:
        if mask is not None:
            raise NotImplementedError
        left = self.left(xs[0]) + self.table(index)
        right = torch.sigmoid(self.right(xs[1] - bias))
        return {"both": (left, right), "sum": left + right, "index": index}


class Reused(nn.Module):
    """One relu, one layer and one block, each called more than once."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.fc(x)) + x

    def __init__(self) -> None:
        super().__init__()
        self.quant = QuantStub()
        self.fc = nn.Linear(4, 4)
        self.relu = nn.ReLU()
        self.block = self.Block()
        self.dequant = DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        x = self.relu(self.fc(x))
        x = self.fc(x)
        x = self.relu(x * 2)
        return self.dequant(self.block(self.block(x)))


class Norms(nn.Module):
    """Batch norms that fold, and ones that must not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.up_bn = nn.BatchNorm2d(6)
        self.grouped = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.grouped_bn = nn.BatchNorm2d(4)
        self.plain = nn.BatchNorm2d(4, affine=False)
        self.relu = nn.ReLU6()
        self.fc = nn.Linear(4, 3)
        self.fc_bn = nn.BatchNorm1d(3)
        self.branched = nn.Linear(3, 3)
        self.branched_bn = nn.BatchNorm1d(3)
        self.batch_only = nn.Conv1d(1, 2, 1)
        self.batch_only_bn = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        x = self.up_bn(self.up(x))
        x = self.grouped_bn(self.grouped(x))
        x = self.plain(x).mean((2, 3))
        x = self.fc_bn(self.fc(x))
        y = self.branched(x)
        x = self.branched_bn(y) + y
        return F.relu(self.batch_only_bn(self.batch_only(x.unsqueeze(1))))


class Parts(nn.Module):
    """A float part before and after the quantized one; padding modes; chunks; a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(6, 6)
        self.quant = QuantStub()
        self.conv = nn.Conv1d(1, 4, 3, padding=1, padding_mode="circular")
        self.pool = nn.MaxPool1d(2)
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.dequant = DeQuantStub()
        self.after = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(torch.tanh(self.before(x)).unsqueeze(1))
        x = self.pool(self.conv(x)).transpose(1, 2)
        first, second = x.chunk(2, dim=2)
        x, _ = self.lstm(torch.maximum(first, second))
        return self.after(F.relu(self.dequant(x)))


def cases() -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    """Every model in eval mode with inputs, the same at every call."""
    torch.manual_seed(3)
    return {
        "functional": (Functional(), (torch.randn(7, 3, 6, 6),)),
        "several": (
            SeveralInputs(),
            ([torch.randn(3, 4), torch.randn(3, 4)], torch.tensor([0, 2, 6]), torch.randn(4)),
        ),
        "reused": (Reused(), (torch.randn(5, 4),)),
        "norms": (randomize_norms(Norms()), (torch.randn(3, 2, 6, 6),)),
        "parts": (Parts(), (torch.randn(4, 6),)),
    }


def make(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    model, inputs = cases()[name]
    return model.eval(), inputs
