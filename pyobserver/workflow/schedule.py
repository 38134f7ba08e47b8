"""Switches of training: fake-quantize, observers and batch norms, at once or after some steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

import torch
from torch import nn

from ..batch_norm import freezing_modules, plain_batch_norms
from ..fake_quantize import as_fake_quantize
from .sites import Selection, select_modules

_NOTHING = [None, None, None]


def switch(
    model: nn.Module,
    modules: Selection = None,
    *,
    fake_quant: bool | None = None,
    observer: bool | None = None,
    batch_norm_frozen: bool | None = None,
) -> None:
    """Turn the switches of the fake-quantizes and batch norms of a model, or of a part of it.

    The switches are buffers that the kernels read: turning them waits for no device, recompiles
    nothing, and the next replay of a CUDA graph follows. Three kinds of modules keep or read
    theirs on the host, where compiled code is compiled once more: the fused modules of torch.ao
    (``ConvBn2d`` and the like, by their ``freeze_bn_stats``), the fake-quantizes of
    :mod:`pyobserver.horizon` and ``torch.ao.quantization.FakeQuantize``.

    Args:
        model: any module. In a wrapper (``DistributedDataParallel``, a compiled module) the names
            begin with that of its attribute, as in ``"module.layer1"``.
        modules: which modules, as of :func:`pyobserver.calibrate`; what lies inside one is
            switched with it, so that ``"layer1"`` is the whole layer. None: all.
        fake_quant: round, or pass the values through.
        observer: gather statistics and choose the scale anew, or keep both.
        batch_norm_frozen: normalize by the running statistics and keep them, or by those of each
            batch, see :class:`pyobserver.FreezableBatchNorm2d`.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: no switch is given, none of the modules has it, or one of the batch norms is
            of a class that cannot be frozen.
        RuntimeError: a CUDA graph is being captured, of which the change would become a part.
            Nothing has changed then, whichever error it is.
    """
    given = {
        "fake_quant": fake_quant,
        "observer": observer,
        "batch_norm_frozen": batch_norm_frozen,
    }
    for name, value in given.items():
        if not isinstance(value, (bool, NoneType)):
            raise TypeError(f"switch: {name}: expected True, False or None, got {value!r}")
    if all(value is None for value in given.values()):
        raise ValueError(f"switch: {', '.join(given)}: expected one of them, got none")
    _switch("switch", model, modules, *given.values())


class QATSchedule:
    """Turns the switches of quantization-aware training after some steps.

    Like torch's learning-rate schedulers: made before training, which writes the switches of step
    0, and stepped after each ``optimizer.step()``. The steps are counted on the host, and the
    switches written only at the step at which they change (see :func:`switch`: no device sync, no
    recompilation, and between the replays of a CUDA graph). What is turned by hand in between stays
    until then. To treat parts of a model differently, make a schedule for each.

    * Gradient accumulation: one step for each ``optimizer.step()``, not for each backward.
    * Several processes: every rank steps alike, and so has the same switches.
    * A fake-quantize that is added later is switched with the others from the next change on; until
      then its switches are its own.
    * Inside of a compiled function or a capture it has no place: the count is the host's.
    * Evaluation does not turn observers off: ``switch(model, observer=False)`` before, and
      ``schedule.apply()`` after it.

    Args:
        model: the model that is trained; already prepared, and with batch norms that can be frozen
            (:func:`pyobserver.make_batch_norm_freezable`) where they are to be.
        fake_quant_from: the number of steps after which values are rounded; 0: from the start.
        observer_until: the number of steps after which observers stop, and scales are kept, or
            learned where they are parameters; 0: none observes.
        freeze_batch_norm_from: the number of steps after which the statistics of the batch norms
            are frozen.
        modules: which modules, see :func:`switch`. None: all.

    What is None is left alone.

    Attributes:
        steps: the number of steps taken.

    Raises:
        TypeError, ValueError: as of :func:`switch`; a number of steps that is none; three Nones.

    Source: the delay of Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018; the frozen batch norms of Krishnamoorthi, "Quantizing
    deep convolutional networks for efficient inference: A whitepaper", 2018.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        fake_quant_from: int | None = None,
        observer_until: int | None = None,
        freeze_batch_norm_from: int | None = None,
        modules: Selection = None,
    ):
        given = {
            "fake_quant_from": fake_quant_from,
            "observer_until": observer_until,
            "freeze_batch_norm_from": freeze_batch_norm_from,
        }
        for name, value in given.items():
            if value is not None:
                _check_steps("QATSchedule", name, value)
        if all(value is None for value in given.values()):
            raise ValueError(f"QATSchedule: {', '.join(given)}: expected one of them, got none")
        self.steps = 0
        self._model, self._modules = model, modules
        # when each changes, and to what
        self._changes = (
            (fake_quant_from, True),
            (observer_until, False),
            (freeze_batch_norm_from, True),
        )
        self.apply()

    def step(self) -> None:
        """Count a step, and turn the switches that are due; after ``optimizer.step()``."""
        steps = self.steps + 1
        due = [after if at == steps else None for at, after in self._changes]
        if due != _NOTHING:
            self._write(due)
        self.steps = steps

    def apply(self) -> None:
        """Turn every switch to where it belongs at this step."""
        self._write_all(self.steps)

    def _write_all(self, steps: int) -> None:
        self._write([at if at is None else (steps >= at) == after for at, after in self._changes])

    def _write(self, states: Sequence[bool | None]) -> None:
        _switch("QATSchedule", self._model, self._modules, *states)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, ``{"steps": ...}``. The switches are buffers of the model."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on after the saved number of steps, and turn every switch to where it belongs then.

        By the numbers that this schedule was made with, whatever the model's state_dict had, and
        whichever of the two is loaded first. What was turned by hand is to be turned again.

        Raises:
            ValueError, TypeError: no state_dict of a schedule. Nothing has changed then.
        """
        if not isinstance(state_dict, Mapping) or set(state_dict) != {"steps"}:
            raise ValueError(
                "QATSchedule.load_state_dict: state_dict: expected {'steps': ...}, "
                f"got {state_dict!r}"
            )
        _check_steps("QATSchedule.load_state_dict", "steps", state_dict["steps"])
        self._write_all(state_dict["steps"])
        self.steps = state_dict["steps"]


def _check_steps(owner: str, name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{owner}: {name}: expected a number of steps, got {value!r}")
    if value < 0:
        raise ValueError(f"{owner}: {name}: expected a number of steps from 0 on, got {value}")


def _switch(
    owner: str,
    model: nn.Module,
    modules: Selection,
    fake_quant: bool | None,
    observer: bool | None,
    batch_norm_frozen: bool | None,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{owner}: model: expected a torch.nn.Module, got {model!r}")
    parts = [model] if modules is None else [*select_modules(model, modules, owner).values()]
    fakes: list[Any] = []
    norms: list[Any] = []
    if fake_quant is not None or observer is not None:
        fakes = [module for part in parts for module in part.modules() if as_fake_quantize(module)]
        if not fakes:
            raise _missing(owner, "fake-quantizes", parts)
    if batch_norm_frozen is not None:
        norms = [module for part in parts for module in freezing_modules(part)]
        _refuse_plain(owner, parts)
        if not norms:
            raise _missing(owner, "batch norms", parts)
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{owner}: expected no capture of a CUDA graph, got one under way")
    for module in fakes:
        if fake_quant is not None:
            module.enable_fake_quant(fake_quant)
        if observer is not None:
            module.enable_observer(observer)
    for module in norms:
        if batch_norm_frozen:
            module.freeze_bn_stats()
        else:
            module.update_bn_stats()


def _refuse_plain(owner: str, parts: list[nn.Module]) -> None:
    plain = [
        f"{type(module).__name__} {name}".rstrip()
        for part in parts
        for name, module in plain_batch_norms(part).items()
    ]
    if plain:
        raise ValueError(
            f"{owner}: modules: expected batch norms that can be frozen (of torch's, "
            f"make_batch_norm_freezable makes them), got {', '.join(plain)}"
        )


def _missing(owner: str, wanted: str, parts: list[nn.Module]) -> ValueError:
    kinds = sorted({type(part).__name__ for part in parts})
    return ValueError(f"{owner}: modules: expected {wanted}, got none in {', '.join(kinds)}")
