"""``pyobserver demo``: a small network trained, calibrated and quantized, beside torch.ao."""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import pyobserver

from ..ranges import METHODS, Solution
from ..workflow import CalibrationResult, calibrate
from ..workflow.table import aligned
from .info import backend

# (activations, weights)
_OBSERVERS = (
    ("MinMaxObserver", "MinMaxObserver"),
    ("MinMaxObserver", "PerChannelMinMaxObserver"),
    ("MovingAverageMinMaxObserver", "MovingAverageMinMaxObserver"),
    ("MovingAverageMinMaxObserver", "MovingAveragePerChannelMinMaxObserver"),
    ("HistogramObserver", "MinMaxObserver"),
    ("HistogramObserver", "PerChannelMinMaxObserver"),
    ("LogHistogramObserver", "MinMaxObserver"),
    ("LogHistogramObserver", "PerChannelLogHistogramObserver"),
)
_SLOW_WITHOUT_NATIVE = _OBSERVERS[-1]  # a search for each of 154 channels
_BATCH = 64
_CALIBRATION_BATCHES = 10


def run(output: Path, quick: bool) -> int:
    """Print the tables and draw the pictures; returns the exit status.

    Args:
        output: the file of the first picture, PNG or whatever else its suffix says; the second
            lies beside it, with ``-tails`` in its name.
        quick: train for fewer epochs, time fewer repeats, compare at fewer widths.
    """
    try:
        from .plot import draw_methods, draw_ranges

        data = _digits()
    except ImportError as error:
        print(f"demo: {error}; try: pip install 'pyobserver[demo]'", file=sys.stderr)
        return 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # steadier times, and no slower on tensors this small
    try:
        batches, labels, model, results = _calibrations(*data, quick)
        _compare(results["LogHistogram"], *data[1::2], model, quick)
        by_site = _gradients(model, batches, labels)
        site = max(by_site, key=lambda name: _kurtosis(by_site[name]))
        solutions = _solutions(by_site[site])
    finally:
        torch.set_num_threads(threads)
    draw_ranges(_activations(model, batches), results, output)
    tails = output.with_stem(f"{output.stem}-tails")
    title = f"Gradients of the loss at {site} (kurtosis {_kurtosis(by_site[site]):.0f})"
    draw_methods(title, by_site[site], solutions, tails)
    print(f"\npicture: {output}, what each observer chose")
    print(f"picture: {tails}, what each method chooses for values with heavy tails")
    return 0


def _calibrations(
    train_x: Tensor, test_x: Tensor, train_y: Tensor, test_y: Tensor, quick: bool
) -> tuple[list[Tensor], list[Tensor], nn.Module, dict[str, CalibrationResult]]:
    """Train and print the accuracies and times.

    The calibration batches and their labels, the model, and the 8-bit calibrations.
    """
    torch.manual_seed(0)
    model = _network()
    start = time.perf_counter()
    _train(model, train_x, train_y, epochs=6 if quick else 12)
    print(f"backend: {backend()}, one thread")
    print(
        f"trained on {len(train_x)} digits in {time.perf_counter() - start:.1f} s, "
        f"tested on {len(test_x)}, calibrated on {_CALIBRATION_BATCHES} batches of {_BATCH}"
    )
    print(f"accuracy in float32: {_accuracy(model, test_x, test_y):.2%}\n")

    batches = list(train_x.split(_BATCH)[:_CALIBRATION_BATCHES])
    repeats = 2 if quick else 9
    rows: list[tuple[str, ...]] = [
        ("activations", "weights", "int8", "int4", "pyobserver", "torch.ao", "ratio")
    ]
    results = {}
    for names in _OBSERVERS:
        if names == _SLOW_WITHOUT_NATIVE and not pyobserver.native_status.cpu:
            continue
        accuracies = []
        for bits in (8, 4):
            result = _calibrated(pyobserver, names, bits, model, batches)
            accuracies.append(f"{_accuracy(result.apply(model), test_x, test_y):.2%}")
            if bits == 8:
                results[_short(names[0])] = result
        times = _times(names, model, batches, repeats)
        rows.append((*map(_short, names), *accuracies, *times))
    print("\n".join(aligned(rows, numbers=5)))
    fixed = pyobserver.FixedQParamsObserver.with_args(scale=1.0, zero_point=0)
    idle = _medians(
        repeats,
        [lambda: calibrate(model, batches, activation=fixed, weight=fixed, progress=False)],
    )
    print(
        "\nTimes are of a whole calibration in ms, medians of interleaved repeats; the ratio is "
        f"torch.ao / pyobserver.\nThe model, the hooks and the SQNR alone take {idle[0]:.1f} ms."
    )
    labels = list(train_y.split(_BATCH)[:_CALIBRATION_BATCHES])
    return batches, labels, model, results


def _compare(
    result: CalibrationResult, images: Tensor, labels: Tensor, model: nn.Module, quick: bool
) -> None:
    """Print what each method makes of the activations at each width, from one calibration."""
    widths = (2, 4, 8) if quick else (2, 3, 4, 6, 8)
    comparison = result.compare(bits=widths, sites="*put")
    print(
        f"\nThe activations in other widths, from what LogHistogram collected once:\n\n{comparison}"
    )
    rows = [("method", *(f"{bits} bits" for bits in widths))]
    for method in comparison.methods:
        solved = (result.solve(method, bits, sites="*put") for bits in widths)
        rows.append(
            (method, *(f"{_accuracy(one.apply(model), images, labels):.2%}" for one in solved))
        )
    print(
        "\nMeasured is on 2048 values of each tensor; one that is clipped and rare weighs too much "
        "there.\nThe accuracy, the weights in int8:\n"
    )
    print("\n".join(aligned(rows, numbers=len(widths))))


def _gradients(model: nn.Module, batches: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
    """All gradients of the loss at the output of each layer with a weight."""
    found: dict[str, list[Tensor]] = {}
    for batch, label in zip(batches, labels, strict=True):
        x, outputs = batch, {}
        for name, layer in model.named_children():
            x = layer(x)
            if hasattr(layer, "weight"):
                outputs[f"{name}.output"] = x
        loss = nn.functional.cross_entropy(x, label)
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        for name, gradient in zip(outputs, gradients, strict=True):
            found.setdefault(name, []).append(gradient.flatten())
    return {name: torch.cat(values) for name, values in found.items()}


def _kurtosis(x: Tensor) -> float:
    """3 for a normal distribution."""
    deviation = x.double() - x.double().mean()
    return float(deviation.pow(4).mean() / deviation.square().mean().square())


def _solutions(x: Tensor) -> dict[str, Solution]:
    """The choice of each method at 4 bits."""
    observer = pyobserver.LogHistogramObserver()
    observer(x)
    return {method: observer.solve(method, bits=4) for method in METHODS}


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train and test images ``(n, 1, 8, 8)`` in [0, 1], then their labels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    return tuple(train_test_split(images, labels, test_size=0.3, random_state=0))


def _network() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 16, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(16, 32, 3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            conv3=nn.Conv2d(32, 32, 3, padding=1),
            relu3=nn.ReLU(),
            pool3=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(128, 64),
            relu4=nn.ReLU(),
            fc2=nn.Linear(64, 10),
        )
    )


def _train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(_BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).float().mean())


def _calibrated(
    library: ModuleType, names: tuple[str, str], bits: int, model: nn.Module, batches: list[Tensor]
) -> CalibrationResult:
    """Calibrate with the observers that ``library`` has by these names."""
    activation, weight = (getattr(library, name) for name in names)
    scheme = torch.per_channel_symmetric if "PerChannel" in names[1] else torch.per_tensor_symmetric
    half = 2 ** (bits - 1)
    return calibrate(
        model,
        batches,
        activation=activation.with_args(dtype=torch.uint8, quant_min=0, quant_max=2 * half - 1),
        weight=weight.with_args(
            dtype=torch.int8, quant_min=-half, quant_max=half - 1, qscheme=scheme
        ),
        progress=False,
    )


def _times(
    names: tuple[str, str], model: nn.Module, batches: list[Tensor], repeats: int
) -> tuple[str, str, str]:
    """The time of a calibration with our observers, with those of torch.ao, and the ratio."""
    libraries, theirs = [pyobserver], ""
    if not any("LogHistogram" in name for name in names):  # which torch.ao has not
        try:
            libraries.append(importlib.import_module("torch.ao.quantization"))
        except ImportError:
            theirs = "not importable"
    works = [partial(_calibrated, library, names, 8, model, batches) for library in libraries]
    medians = _medians(repeats, works)
    if len(medians) == 1:
        return f"{medians[0]:.1f}", theirs, ""
    return f"{medians[0]:.1f}", f"{medians[1]:.1f}", f"{medians[1] / medians[0]:.2f}"


def _medians(repeats: int, works: Sequence[Callable[[], Any]]) -> list[float]:
    """The median time of each work in ms; they take turns."""
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, times in zip(works, taken, strict=True):
            start = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - start))
    return [statistics.median(times) for times in taken]


@torch.no_grad()
def _activations(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """All values that each layer with a weight gives, by the name of their site."""
    seen: dict[str, list[Tensor]] = {}
    for batch in batches:
        x = batch
        for name, layer in model.named_children():
            x = layer(x)
            if hasattr(layer, "weight"):
                seen.setdefault(f"{name}.output", []).append(x.flatten())
    return {name: torch.cat(values) for name, values in seen.items()}


def _short(name: str) -> str:
    return name.removesuffix("Observer")
