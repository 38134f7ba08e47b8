"""Activation checkpointing runs a forward again in the backward; what is observed counts once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.utils import _python_dispatch

from .. import _checks
from ._library import define

_OP = "_unless_in_backward"
# private in torch; without them a checkpointed tensor counts twice, as in torch's batch norm
backward_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)
_without_modes: Any = getattr(_python_dispatch, "_disable_current_modes", nullcontext)

_CHECKPOINT, _ENGINE = torch.utils.checkpoint.__file__, torch.autograd.graph.__file__


def is_recomputing() -> bool:
    """Whether this is a forward that activation checkpointing runs again, in a backward.

    Hooks and functions of gradients, in which grad mode is off, are not: they may be observed.
    """
    return not is_dynamo_compiling() and backward_task() != -1 and _is_rerun()


def _is_rerun() -> bool:
    """Whether what runs in this backward is a forward."""
    if torch.is_grad_enabled():  # as all checkpointing has it
        return True
    # but not of a reentrant checkpoint inside another
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != _ENGINE:
        if frame.f_code.co_filename == _CHECKPOINT:
            return True
        frame = frame.f_back
    return False


def unless_recomputing(enabled: Tensor) -> Tensor:
    """The switch of an observer, or in a recomputation one that is off.

    Not to be left out instead: selective checkpointing looks for the same ops a second time.
    """
    if is_dynamo_compiling():
        return _op(enabled) if _is_checkpoint_traced() else enabled
    if backward_task() == -1 or not _is_rerun():
        return enabled
    # of a tracer's tensors it has to be one of them
    return _off(enabled.device) if type(enabled) is Tensor else torch.zeros_like(enabled)


def _off(device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _made_off(device)  # the graph's own: it is not zero before a replay
    return _kept_off(device)


def _made_off(device: torch.device) -> Tensor:
    # selective checkpointing must not see it made
    with torch.inference_mode(False), _without_modes():
        return torch.zeros(1, dtype=torch.uint8, device=device)


_kept_off = cache(_made_off)


def _is_checkpoint_traced() -> bool:
    """Whether Dynamo, which runs this while it traces, is inside a checkpointed function."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.endswith("higher_order_ops.py"):
            tracer = type(frame.f_locals.get("self")).__name__
            if "Checkpoint" in tracer:
                return True
        frame = frame.f_back
    return False


_is_checkpoint_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check(enabled: Tensor) -> None:
    _checks.check_enabled(_OP, enabled)


def reference(enabled: Tensor) -> Tensor:
    _check(enabled)
    return enabled.clone() if backward_task() == -1 else torch.zeros_like(enabled)


def fake(enabled: Tensor) -> Tensor:
    return torch.empty_like(enabled)


# for compiled graphs, whose backward runs a checkpointed forward's nodes again, on the state that
# the forward has left
_op = define(f"{_OP}(Tensor enabled) -> Tensor", _check, reference, fake)
