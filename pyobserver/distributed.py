"""The statistics of all ranks of a job on every one of them, over ``torch.distributed``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ._checks import is_dtensor
from .fake_quantize import FakeQuantize
from .observers import ObserverBase, merging
from .ops.recomputation import is_recomputing

__all__ = ["SyncHandle", "sync", "sync_after_forward"]

_UNSIZED = 2**62  # more channels or blocks than any
_MARK = "_syncs_statistics"  # of a hook


def sync(
    model_or_observers: nn.Module | Iterable[ObserverBase], group: dist.ProcessGroup | None = None
) -> None:
    """Give every rank the statistics of all ranks' data, in place, and the same bytes to each.

    To be called by every rank of the group, after calibrating a copy of the model on data of its
    own. Ranks that saw no data, or other numbers of batches, take part like the others. However
    many observers there are: two small all-reduces to agree on them, and one an operation and
    dtype for their buffers.

    * Least and greatest values, counts of log histograms, ``nonfinite_count``: what one process
      has that sees all the data, to the byte.
    * Moving averages: the mean over the ranks that were fed, in float64, rounded once.
    * Linear histograms (:class:`HistogramObserver`): over the union of the ranges, to which each
      rank carries its counts by the midpoints of ``upsample_rate`` parts of a bin; summed in
      float64.
    * Memoryless and dynamic observers, and those that gather no statistics (fixed parameters,
      placeholders, recorders): left as they are.

    The scale and zero point of each of a module's fake-quantizes (:class:`FakeQuantize`, whatever
    its switches say; :class:`LearnableFakeQuantize` while its observer is on) are then those of all
    the data; where no rank was fed, as they were.

    Call it once, when all the data is seen: counts that are summed again are counted once a rank.
    To go on observing after it, reset the observers of all ranks but one. Least and greatest values
    and moving averages may be synced as often as wanted. In training, see
    :func:`sync_after_forward`.

    Args:
        model_or_observers: a module, whose observers are synced, also those inside its
            fake-quantizes (the hosts' own observers are not); an observer; or some observers.
        group: the ranks that take part; None: all. A process outside it does nothing, and so does
            one alone. Where its backends do not serve the device of the observers, the statistics
            are reduced on one that they do serve.

    Raises:
        TypeError: neither a module nor observers; on the rank that gave it, before any
            communication.
        RuntimeError: no process group is initialized.
        ValueError: the ranks have different observers, or one that saw different numbers of
            channels or blocks; on every rank, which keeps its statistics as they were.

    Source: the ``sync_minmax`` of Horizon's observers, for least and greatest values.
    """
    observers = _observers(model_or_observers)
    _check_initialized("sync")
    if dist.get_world_size(group) < 2:  # -1 outside the group
        return
    _merge(observers, group)
    if isinstance(model_or_observers, nn.Module):
        with torch.no_grad():
            for module in _fake_quantizes(model_or_observers, observers):
                module.update_scale()


class SyncHandle:
    """What :func:`sync_after_forward` registered; :meth:`remove` takes it away again."""

    def __init__(self, *hooks: RemovableHandle):
        self._hooks = hooks

    def remove(self) -> None:
        """Let each rank observe for itself from now on; on every rank before its next forward."""
        for hook in self._hooks:
            hook.remove()


def sync_after_forward(model: nn.Module, group: dist.ProcessGroup | None = None) -> SyncHandle:
    """Sync a model's statistics over the ranks after each of its forwards in training mode.

    For training on several ranks: each forward folds a rank's own batch into the statistics, and
    then all ranks take in those of the others. So every forward begins with the statistics of all
    data before it, the same bytes on every rank, and every rank's buffers may be saved as those of
    all. Without it the statistics are of the first rank's data alone where DDP broadcasts buffers
    (as it does by default, before each forward), and where it does not, or under FSDP, of each
    rank's own.

    The rules are those of :func:`sync`, but counts add up however often: least and greatest values
    and log histograms are what one process has that sees the batches of all. A moving average is
    that of the mean over the ranks of the ends that each saw, an empty batch standing for no
    change. The scale and zero point of a fake-quantize whose observer is on are chosen once more.
    Observers of Horizon with ``is_sync_quantize`` are left alone: they see all ranks' data anyway.

    All ranks must run the model together, as DDP and FSDP want it too, one that has an empty batch
    among them. In eval mode nothing is sent: a rank may validate alone. A forward costs the
    all-reduces of :func:`sync`, five at most, and waits for them. One that activation checkpointing
    runs again, in the backward, sends nothing; it quantizes by the scale of all ranks, which the
    first run did not have yet, until the observers are off.

    Args:
        model: what is called in training: all ranks' have the same state before the first forward.
            Of DistributedDataParallel its module is meant. Observers that are added later are
            synced from the next forward on.
        group: see :func:`sync`.

    Returns:
        What removes it, as is to be done before the model is pickled. Copies go on to sync.

    Raises:
        TypeError: no module.
        RuntimeError: no process group is initialized.
        ValueError: the model, or a module in it, is synced already. In forward: as :func:`sync`.
    """
    owner = "sync_after_forward"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{owner}: model: expected a module, got {type(model).__name__}")
    _check_initialized(owner)
    if isinstance(model, DistributedDataParallel):
        model = model.module  # whose forward begins when DDP has broadcast the buffers
    for name, module in model.named_modules():
        if any(getattr(hook, _MARK, False) for hook in module._forward_hooks.values()):
            raise ValueError(
                f"{owner}: model: expected one that is not synced after its forwards yet, "
                f"got {name or 'one'} that is: values would be counted twice"
            )
    counted: dict[str, Any] = {}

    @torch.compiler.disable
    def before(module: nn.Module, args: Any) -> None:
        if is_recomputing():
            return
        counted.clear()
        if module.training and dist.get_rank(group) != 0:  # which brings what all have
            observers = _not_synced_in_forward(module)
            counted.update((name, merging.as_it_is(each)) for name, each in observers.items())

    @torch.compiler.disable
    def after(module: nn.Module, args: Any, output: Any) -> None:
        if not module.training or dist.get_world_size(group) < 2 or is_recomputing():
            return
        observers = _not_synced_in_forward(module)
        _merge(observers, group, [counted.get(name) for name in observers])
        with torch.no_grad():
            for fake in _fake_quantizes(module, observers):
                # a graph that saved a learned scale goes on, as with the buffers that DDP sends
                with torch.autograd._unsafe_preserve_version_counter((fake.scale, fake.zero_point)):
                    fake._choose_qparams(fake.activation_post_process, fake.observer_enabled)

    setattr(after, _MARK, True)
    return SyncHandle(
        model.register_forward_pre_hook(before, prepend=True),
        model.register_forward_hook(after),
    )


def _not_synced_in_forward(model: nn.Module) -> dict[str, Any]:
    """The observers but for those, of Horizon, whose every forward takes in all ranks' tensors."""
    observers = _observers(model)
    return {name: each for name, each in observers.items() if not getattr(each, "syncs", False)}


def _check_initialized(owner: str) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{owner}: torch.distributed: expected an initialized process group "
            "(torch.distributed.init_process_group), got none"
        )


def _merge(observers: dict[str, Any], group: Any, counted: Sequence[Any] = ()) -> None:
    device = _reduction_device(list(observers.values()), group)
    groups = _agreed_groups(observers, device, group)

    def reduce(operation: str, flat: Tensor) -> None:
        dist.all_reduce(flat, getattr(dist.ReduceOp, operation.upper()), group)

    with torch.no_grad():
        merging.merge([list(observers.values())], groups, device, reduce, counted)


def _fake_quantizes(model: nn.Module, observers: dict[str, Any]) -> Iterator[FakeQuantize]:
    """Those whose scale is of these observers, but for the learned ones that FSDP has sharded."""
    synced = {id(observer) for observer in observers.values()}
    for module in model.modules():
        if not isinstance(module, FakeQuantize) or is_dtensor(module.scale):
            continue
        if id(module.activation_post_process) in synced:
            yield module


def _observers(given: Any) -> dict[str, Any]:
    """Those that have statistics to merge, by names to report them by."""
    if isinstance(given, nn.Module):
        named = [(name or type(module).__name__, module) for name, module in given.named_modules()]
        named = [(name, module) for name, module in named if isinstance(module, ObserverBase)]
    elif isinstance(given, Iterable):
        named = [(f"model_or_observers[{i}]", observer) for i, observer in enumerate(given)]
    else:
        raise TypeError(
            "sync: model_or_observers: expected a module, an observer or an iterable of observers, "
            f"got {type(given).__name__}"
        )
    found = {}
    for name, observer in named:
        if not isinstance(observer, ObserverBase):
            raise TypeError(f"sync: {name}: expected an observer, got {type(observer).__name__}")
        if observer._merges:
            found[name] = observer
    return found


def serving_device(device: torch.device | None, group: dist.ProcessGroup | None) -> torch.device:
    """The device, if the group's backends serve it; else one that they do serve."""
    config = dist.get_backend_config(group)  # such as "cpu:gloo,cuda:nccl"
    served = [pair.partition(":")[0] for pair in config.split(",")]
    if device is not None and device.type in served:
        return device
    return torch.device("cpu" if "cpu" in served else served[0])


def _reduction_device(observers: list[Any], group: Any) -> torch.device:
    """Where the first observer is, if the group's backends serve that; else where they serve."""
    return serving_device(observers[0].nonfinite_count.device if observers else None, group)


def _agreed_groups(
    observers: dict[str, Any], device: torch.device, group: Any
) -> list[tuple[int, ...]]:
    """The channels or blocks of each observer, once all ranks have the same observers."""
    agreement = _reduction_device([], group)
    kinds = [merging.describe(observer) for observer in observers.values()]
    own = [len(observers), _code(device.type), _code("\n".join(kinds))]
    least, greatest = _extremes(own, agreement, group)
    if least[:2] != greatest[:2]:
        raise ValueError(
            "sync: model_or_observers: expected as many observers on every rank, on one type of "
            f"device, got {least[0]} to {greatest[0]} (here {len(observers)}, on {device.type})"
        )
    if least != greatest:
        least, greatest = _extremes([_code(kind) for kind in kinds], agreement, group)
        others = [each != most for each, most in zip(least, greatest, strict=True)].index(True)
        raise ValueError(
            f"sync: {list(observers)[others]}: expected the same observer on every rank, "
            f"got others (here {kinds[others]})"
        )
    if not observers:
        return []
    groups = [merging.groups_of(observer) for observer in observers.values()]
    sizes = [size for each in groups for size in each]
    fed = [size or _UNSIZED for size in sizes]
    least, greatest = _extremes([*sizes, *fed], agreement, group)
    agreed: list[tuple[int, ...]] = []
    for name, here in zip(observers, groups, strict=True):
        first = sum(len(each) for each in agreed)
        most = tuple(greatest[first : first + len(here)])
        fewest = tuple(least[len(sizes) + first :][: len(here)])
        if any(most) and fewest != most:
            raise ValueError(
                f"sync: {name}: expected one number of channels or blocks on every rank, "
                f"got {merging.shown(fewest)} to {merging.shown(most)} (here {merging.shown(here)})"
            )
        agreed.append(most)
    return agreed


def _extremes(values: list[int], device: torch.device, group: Any) -> tuple[list[int], list[int]]:
    """The least and the greatest of each value over the ranks."""
    both = torch.tensor([values, [-value for value in values]], device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX, group)
    greatest, negated = both.tolist()
    return [-value for value in negated], greatest


def _code(text: str) -> int:
    """A number below 2^62 for a text, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2
