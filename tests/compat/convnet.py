"""A small network with what quantization flows trip over, and data for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub

CLASSES = 10


class ConvNet(nn.Module):
    """conv-bn-relu, a residual add, pooling, flatten, linear, functional relu, sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.linear1 = nn.Linear(8 * 4 * 4, 16)
        self.linear2 = nn.Linear(16, CLASSES)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = F.relu(self.add(x, self.bn2(self.conv2(x))))
        x = torch.flatten(F.max_pool2d(x, 2), 1)
        return torch.sigmoid(self.linear2(F.relu(self.linear1(x))))


class EagerConvNet(ConvNet):
    """The same, with the stubs and the observable addition that eager mode asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = QuantStub()
        self.dequant = DeQuantStub()
        self.sum = FloatFunctional()

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self.sum.add(x, y)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(super().forward(self.quant(x)))


def make_convnet(kind: type[ConvNet] = ConvNet) -> ConvNet:
    """The same network at every call: seeded weights, and batch norms with statistics to fold."""
    torch.manual_seed(1)
    net = kind()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    # so that the sigmoid at the end tells models apart
    nn.init.normal_(net.linear2.weight)
    return net.eval()


def make_plain_convnet() -> ConvNet:
    """Dropout in the place of the batch norms, whose fusion takes torchao many seconds."""
    net = make_convnet()
    net.bn1, net.bn2 = nn.Identity(), nn.Dropout(0.25)
    return net


def make_batches(count: int = 4) -> list[Tensor]:
    """Digit-sized images; each batch is wider than the one before, so that ranges have to grow."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(4, 1, 8, 8, generator=generator) * (1 + i / 2) for i in range(count)]


def train(model: nn.Module) -> list[float]:
    """A few steps of descent towards a fixed target; the loss before each."""
    torch.manual_seed(3)  # of dropout
    target = torch.linspace(0.0, 1.0, CLASSES).expand(4, CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for batch in make_batches():
        optimizer.zero_grad()
        loss = F.mse_loss(model(batch), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
