"""Digits at few bits: post-training quantization by each method, then quantization-aware training.

A convnet of separable convolutions and batch norms, as of MobileNet, on scikit-learn's digits,
small enough for four bits to cost something. Weights are quantized per channel and symmetric,
activations per tensor and affine, both at the same bits; the result of the last layer is left as it
is. One model serves all rows: torch.ao's ``prepare_qat`` puts the fake-quantizers into it, and
folds a batch norm into the weight before that is rounded. It is calibrated on training images, and
measured, or trained from there:

- post-training by each method of ``pyobserver.ranges``, for activations and weights; KL, which is
  made for many values, for activations alone, with weights by min/max;
- straight-through, scales by min/max: of the weights at each step, of the activations a moving
  average, held in the last half of the training;
- straight-through, scales held at those of MSE;
- LSQ: scales, and zero points of activations, learned from those of MSE on.

Each seed has its own split, initialization and order of batches, shared by all rows. Every training
starts at the same float weights and has the same epochs, optimizer and learning rate, and holds the
batch norms' statistics in its last third; the last epoch counts. All that was chosen on validation
images, that of the training on those of other seeds; the table is of the test images.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.ao.quantization import QConfig, QuantStub, fuse_modules_qat, prepare_qat
from torch.nn.functional import cross_entropy

from pyobserver import (
    FakeQuantize,
    LearnableFakeQuantize,
    LogHistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelLogHistogramObserver,
    PerChannelMinMaxObserver,
    QATSchedule,
    disable_observer,
    switch,
)
from pyobserver.ranges import METHODS

BATCH, CALIBRATION = 64, 512  # images
FLOAT_EPOCHS, FLOAT_LR = 20, 0.05
QAT_EPOCHS, QAT_LR = 30, 0.03
FLOAT = "float32"
BY_STEP, HELD, LSQ = "QAT, min/max", "QAT, MSE, held", "QAT, MSE, learned (LSQ)"
COLOURS = {BY_STEP: "#0072B2", HELD: "#009E73", LSQ: "#D55E00"}  # of Okabe and Ito


Schedule: TypeAlias = Callable[[nn.Module, int], QATSchedule]  # for so many steps


class Split(NamedTuple):
    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    train: Split
    validation: Split
    test: Split


def digits(seed: int) -> Data:
    """Three, one and one fifth of the images ``(n, 1, 8, 8)`` in [0, 1]."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(bunch.target).long()
    parts = []
    for size in (0.2, 0.25):
        images, part, labels, part_labels = train_test_split(
            images, labels, test_size=size, random_state=seed, stratify=labels
        )
        parts.append(Split(part, part_labels))
    test, validation = parts
    return Data(Split(images, labels), validation, test)


class ConvNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.add_module("input", QuantStub())
        self._conv(1, 8, 3)
        for channels in (8, 16):
            self._conv(channels, channels, 3, groups=channels)
            self._conv(channels, 16, 1)
            self.append(nn.MaxPool2d(2))
        self.append(nn.Flatten())
        self.add_module("last", nn.Linear(16 * 2 * 2, 10))

    def _conv(self, channels: int, out: int, size: int, groups: int = 1) -> None:
        conv = nn.Conv2d(channels, out, size, padding=size // 2, groups=groups, bias=False)
        for module in (conv, nn.BatchNorm2d(out), nn.ReLU()):
            self.append(module)

    def fused(self) -> list[list[str]]:
        """The names of each convolution, its batch norm and its ReLU."""
        names = list(self._modules)
        convs = [i for i, name in enumerate(names) if isinstance(self._modules[name], nn.Conv2d)]
        return [names[i : i + 3] for i in convs]


def fit(
    model: nn.Module,
    data: Data,
    epochs: int,
    lr: float,
    seed: int,
    schedule: Schedule | None = None,
) -> list[float]:
    """Train; the validation accuracy after each epoch."""
    images, labels = data.train
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    steps = epochs * -(-len(images) // BATCH)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    switches = schedule and schedule(model, steps)
    curve = []
    for _ in range(epochs):
        model.train()
        for index in torch.randperm(len(images), generator=order).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
            decay.step()
            if switches:
                switches.step()
        curve.append(accuracy(model, data.validation))
        if switches:
            switches.apply()  # observers were off
    return curve


def observing(model: nn.Module, steps: int) -> QATSchedule:
    """Scales of the observers in the first half of the training, held in the second."""
    return QATSchedule(model, observer_until=steps // 2, freeze_batch_norm_from=2 * steps // 3)


def from_scales(model: nn.Module, steps: int) -> QATSchedule:
    """No observers: scales as they were calibrated, or learned from there."""
    return QATSchedule(model, observer_until=0, freeze_batch_norm_from=2 * steps // 3)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """In percent. Turns observers off, which would learn from these images too."""
    model.eval().apply(disable_observer)
    return 100 * float((model(split.images).argmax(1) == split.labels).double().mean())


def of_activations(observer: Any, bits: int, kind: type = FakeQuantize, **options: Any) -> Any:
    """A factory of fake-quantizers."""
    grid = {"quant_min": 0, "quant_max": 2**bits - 1, "dtype": torch.quint8}
    return kind.with_args(observer=observer, qscheme=torch.per_tensor_affine, **grid, **options)


def of_weights(observer: Any, bits: int, kind: type = FakeQuantize) -> Any:
    half = 2 ** (bits - 1)
    grid = {"quant_min": -half, "quant_max": half - 1, "dtype": torch.qint8}
    return kind.with_args(observer=observer, qscheme=torch.per_channel_symmetric, **grid)


def calibrated(
    model: ConvNet, images: Tensor, bits: int, activation: Any, weight: Any, learned: bool = False
) -> nn.Module:
    """A copy with fake-quantizers over these observers, which have seen the images."""
    model = copy.deepcopy(model).train()
    fuse_modules_qat(model, model.fused(), inplace=True)
    act, wt = of_activations(activation, bits), of_weights(weight, bits)
    if learned:
        # LSQ's gradient of a scale does not depend on the size of the batch
        act = of_activations(activation, bits, LearnableFakeQuantize, grad_factor="features")
        wt = of_weights(weight, bits, LearnableFakeQuantize)
    model.qconfig = QConfig(act, wt)
    # pixels have a known range
    model.input.qconfig = QConfig(of_activations(MinMaxObserver, bits), wt)
    model.last.qconfig = QConfig(nn.Identity, wt)
    prepare_qat(model, inplace=True)
    switch(model, fake_quant=False)
    with torch.no_grad():
        model.eval()(images)
    switch(model, fake_quant=True, observer=False)
    return model


def after_training(method: str) -> tuple[Any, Any]:
    """The observers of activations and weights for a method of ranges."""
    activation = LogHistogramObserver.with_args(method=method)
    if method == "kl":
        return activation, PerChannelMinMaxObserver
    return activation, PerChannelLogHistogramObserver.with_args(method=method)


class Outcome(NamedTuple):
    """Accuracies in percent."""

    validation: list[float]  # at the start, and after each epoch of training
    test: float  # at the end


def outcomes(
    seed: int, widths: Sequence[int], float_epochs: int, qat_epochs: int
) -> dict[tuple[str, int], Outcome]:
    """Every row at every width, for one split and initialization."""
    torch.manual_seed(seed)
    data = digits(seed)
    model = ConvNet()
    fit(model, data, float_epochs, FLOAT_LR, seed)
    shown = data.train.images[:CALIBRATION]

    def measured(model: nn.Module, schedule: Schedule | None = None) -> Outcome:
        curve = [accuracy(model, data.validation)]
        if schedule:
            curve += fit(model, data, qat_epochs, QAT_LR, seed, schedule)
        return Outcome(curve, accuracy(model, data.test))

    found = {}
    for bits in widths:
        found[FLOAT, bits] = measured(model)
        for method in METHODS:
            ptq = calibrated(model, shown, bits, *after_training(method))
            found[f"PTQ, {method}", bits] = measured(ptq)
        qat = calibrated(model, shown, bits, MovingAverageMinMaxObserver, PerChannelMinMaxObserver)
        found[BY_STEP, bits] = measured(qat, observing)
        held = calibrated(model, shown, bits, *after_training("mse"))
        found[HELD, bits] = measured(held, from_scales)
        lsq = calibrated(model, shown, bits, *after_training("mse"), learned=True)
        found[LSQ, bits] = measured(lsq, from_scales)
    return found


def table(runs: Sequence[dict[tuple[str, int], Outcome]]) -> str:
    """Mean and standard deviation over the seeds, on the test images, in Markdown."""
    rows = list(dict.fromkeys(row for row, _ in runs[0]))
    widths = list(dict.fromkeys(bits for _, bits in runs[0]))
    lines = [["", *(f"{bits} bits" for bits in widths)], ["---"] * (1 + len(widths))]
    for row in rows:
        cells = [_spread([run[row, bits].test for run in runs]) for bits in widths]
        lines.append([row, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def draw(runs: Sequence[dict[tuple[str, int], Outcome]], path: Path) -> None:
    """The validation accuracy over the epochs of training, a panel for each width."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "digits"  # the same file from the same figures
    from matplotlib import pyplot as plt

    widths = list(dict.fromkeys(bits for _, bits in runs[0]))
    # white, also where the page is dark
    figure, axes = plt.subplots(
        1, len(widths), figsize=(3.4 * len(widths), 3.6), facecolor="white", layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for ax, bits in zip(axes[0], widths, strict=True):
        curves = {
            row: torch.tensor([run[row, bits].validation for run in runs])
            for row, of in runs[0]
            if of == bits
        }
        best = max((row for row in curves if "PTQ" in row), key=lambda row: curves[row].mean())
        ax.axhline(curves[FLOAT].mean(), color="#888888", linestyle="--", linewidth=1, label=FLOAT)
        ax.axhline(
            curves[best].mean(), color="#000000", linestyle=":", linewidth=1.3, label="best PTQ"
        )
        for row, colour in COLOURS.items():
            middle = curves[row].mean(0)
            epochs = range(len(middle))
            ax.plot(epochs, middle, color=colour, linewidth=1.5, label=row)
            ends = curves[row].amin(0), curves[row].amax(0)
            ax.fill_between(epochs, *ends, color=colour, alpha=0.15, linewidth=0)
        ax.set(title=f"{bits} bits; best PTQ: {best.removeprefix('PTQ, ')}", xlabel="epoch")
        ax.title.set_fontsize(10)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("validation accuracy, %")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    reproducible = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
    figure.savefig(path, dpi=110, **reproducible)
    plt.close(figure)


def main(
    seeds: int = 5,
    widths: Sequence[int] = (4, 3, 2),
    float_epochs: int = FLOAT_EPOCHS,
    qat_epochs: int = QAT_EPOCHS,
    picture: Path | None = None,
) -> list[dict[tuple[str, int], Outcome]]:
    """Print the table, and draw the picture; the outcomes of each seed by row and width."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.ao's, of itself
        runs = [outcomes(seed, widths, float_epochs, qat_epochs) for seed in range(seeds)]
    print(table(runs))
    if picture is not None:
        draw(runs, picture)
    return runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--picture", type=Path, help=".svg or .png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # no slower on tensors this small
    main(arguments.seeds, picture=arguments.picture)
