"""What training keeps for the backward, and a step's peak; each in a process of its own.

What is kept is counted twice: as the tensors that autograd is given to save, and as the memory that
a forward leaves resident, which sees as well what a function keeps in other ways.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo  # an optimizer's first step would, in each process anew
from torch import Tensor, nn

from pyobserver.tensor_quant import QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW, TensorQuantizer

from ..memory import grown, traced
from .models import MODELS, MODULES, contenders, prepared, step_of
from .report import SavedBytes, StepBytes

_CHANNELS = 64
_ELEMENTS, QUICK_ELEMENTS = 16_000_000, 1_600_000
_QUICK_BATCH = 2


@contextmanager
def saved() -> Iterator[dict[int, int]]:
    """The storages that autograd is given to save within it: bytes, by address."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def modules() -> dict[tuple[str, str], Callable[[], nn.Module]]:
    """What is asked how much it keeps, by its name and its granularity."""
    found: dict[tuple[str, str], Callable[[], nn.Module]] = {}
    for name, factories in MODULES.items():
        if factories.activation is not nn.Identity:
            found[name, "per tensor"] = factories.activation
            found[name, "per channel"] = factories.weight(_CHANNELS)
    found["our TensorQuantizer", "per tensor"] = TensorQuantizer
    found["our TensorQuantizer", "per channel"] = lambda: TensorQuantizer(
        QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW
    )
    return found


def _saved_by(name: str, granularity: str, elements: int) -> SavedBytes:
    with traced():
        module = modules()[name, granularity]()
        x = torch.randn(_CHANNELS, elements // _CHANNELS).requires_grad_()
        with saved() as found:
            y = module(x)
        by_tensors = sum(found.values())
        of_input = found.get(x.untyped_storage().data_ptr(), 0)
        del y, found
        _, kept = grown(lambda: module(x))
    return SavedBytes(
        name,
        granularity,
        tensors=(by_tensors - of_input) / elements,
        resident=(kept - x.nbytes) / elements,
        of_input=of_input / elements,
    )


def _step_bytes(model: str, contender: str, batch: int) -> StepBytes:
    with traced():
        trained, x = prepared(MODELS[model], contender, batch)
        step = step_of(trained, x)
        step()
        own = {t.untyped_storage().data_ptr() for t in (x, *trained.parameters())}
        with saved() as found:
            step()
        kept = sum(count for address, count in found.items() if address not in own)
        del found
        peak, _ = grown(step)
    return StepBytes(model, contender, peak, kept)


def _tell(pipe: Any, work: Callable[..., object], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send(work(*arguments))
    except Exception as error:
        pipe.send(error)


def apart(work: Callable[..., Any], *arguments: object) -> Any:
    """The result in a process of its own, whose heap is as the imports left it.

    A copy of this one, which must not have used its threads.
    """
    if not hasattr(os, "fork"):
        raise OSError("it takes Linux and glibc")
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_tell, args=(there, work, arguments)
    )
    process.start()
    there.close()
    found = here.recv()
    process.join()
    if isinstance(found, Exception):
        raise found
    return found


def count_saved(quick: bool) -> Iterator[SavedBytes]:
    """Raises OSError where resident memory cannot be followed; so does the next."""
    for name, granularity in modules():
        print(f"kept for the backward: {name}, {granularity}", file=sys.stderr)
        yield apart(_saved_by, name, granularity, QUICK_ELEMENTS if quick else _ELEMENTS)


def count_steps(model: str, quick: bool) -> Iterator[StepBytes]:
    for contender in contenders("float32"):
        print(f"peak of a step: {model}, {contender}", file=sys.stderr)
        batch = _QUICK_BATCH if quick else MODELS[model].large_batch
        yield apart(_step_bytes, model, contender, batch)
