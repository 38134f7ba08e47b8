"""Batch norms whose statistics are frozen by a buffer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.compiler import is_exporting

__all__ = [
    "FreezableBatchNorm1d",
    "FreezableBatchNorm2d",
    "FreezableBatchNorm3d",
    "make_batch_norm_freezable",
]

_BatchNorm = nn.modules.batchnorm._BatchNorm


class _Normalize(torch.autograd.Function):
    """``x`` normalized by ``mean`` and ``var``: constants where frozen, else x's own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        frozen: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, frozen)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, frozen = ctx.saved_tensors
        # the sums of grad * normalized and of grad: one pass, whether frozen or not
        _, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
        )
        to_x = None
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        if for_x:
            slope = torch.rsqrt(var + ctx.eps)
            if weight is not None:
                slope = slope * weight
            # what comes by way of the mean and variance is affine in x, channel by channel
            share = torch.where(frozen, 0.0, slope * (-x.shape[1] / x.numel()))
            to_x = F.batch_norm(
                x, mean, var, share * to_weight, share * to_bias, False, 0.0, ctx.eps
            )
            to_x.addcmul_(grad, slope.to(x.dtype).reshape(-1, *[1] * (x.dim() - 2)))
        grads = to_x, to_weight if for_weight else None, to_bias if for_bias else None
        return *grads, None, None, None, None


def _mean_and_var(x: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and biased variance of each channel, in the type of ``like``."""
    if torch.compiler.is_compiling() or x.device.type not in ("cpu", "cuda"):
        dims = [0, *range(2, x.dim())]
        var, mean = torch.var_mean(x.to(like.dtype), dims, correction=0)
        return mean, var
    mixed = x.dtype != like.dtype
    # of the type of these two, which a momentum of 0 leaves alone
    running = (torch.zeros_like(like), torch.ones_like(like)) if mixed else (None, None)
    return torch.batch_norm_update_stats(x, running[0], running[1], 0.0)


def _is_readable(flag: Tensor) -> bool:
    """Whether the host knows it without waiting: of a CPU, and while no graph is made."""
    on_cpu = flag.device.type == "cpu" and type(flag) is Tensor  # else one without data
    return on_cpu and not torch.compiler.is_compiling()


class _Freezable(_BatchNorm):
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    frozen: Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.running_mean is None:
            raise ValueError(
                f"{type(self).__name__}: track_running_stats: expected True (there is nothing else "
                "to freeze), got False"
            )
        self._register_frozen()

    def _register_frozen(self) -> None:
        # as the switches of a fake-quantize
        frozen = torch.zeros((), dtype=torch.uint8, device=self.running_mean.device)
        self.register_buffer("frozen", frozen)

    def freeze_bn_stats(self) -> None:
        """Normalize by the running statistics from now on, and keep them as they are."""
        self.frozen.fill_(1)

    def update_bn_stats(self) -> None:
        """Normalize by the statistics of each batch again, and let the running ones follow."""
        self.frozen.fill_(0)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` normalized, shaped as it."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        count = self._values_per_channel(input)
        if count == 0:
            return self._by_running(input)
        if _is_readable(self.frozen):
            return self._by_running(input) if self.frozen else super().forward(input)
        frozen = self.frozen.bool()
        running_mean, running_var = self.running_mean, self.running_var
        exporting = is_exporting()  # which drops the backward of a Function
        batch_mean, batch_var = _mean_and_var(input if exporting else input.detach(), running_mean)
        mean = torch.where(frozen, running_mean, batch_mean)
        var = torch.where(frozen, running_var, batch_var)
        if exporting:
            y = self._by_operations(input, mean, var)
        else:
            y = _Normalize.apply(input, self.weight, self.bias, mean, var, frozen, self.eps)
        self._follow(mean.detach(), var.detach(), ~frozen, count)
        return y

    def _by_operations(self, input: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Normalized by operations that pass a gradient on to mean and variance."""
        slope = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            slope = slope * self.weight
        shape = -1, *[1] * (input.dim() - 2)
        y = (input - mean.reshape(shape)) * slope.reshape(shape)
        return (y if self.bias is None else y + self.bias.reshape(shape)).to(input.dtype)

    def _values_per_channel(self, input: Tensor) -> int:
        count = input.numel() // self.num_features
        if input.shape[1] != self.num_features or count == 1:
            raise ValueError(
                f"{type(self).__name__}: input: expected {self.num_features} channels, in training "
                f"of more than 1 value, got shape {tuple(input.shape)}"
            )
        return count

    def _by_running(self, input: Tensor) -> Tensor:
        running = self.running_mean, self.running_var
        return F.batch_norm(input, *running, self.weight, self.bias, eps=self.eps)

    def _follow(self, mean: Tensor, var: Tensor, live: Tensor, count: int) -> None:
        """Move the running statistics; where frozen, towards themselves."""
        self.num_batches_tracked.add_(live)
        share: Any = self.momentum
        if share is None:
            share = self.num_batches_tracked.clamp(min=1).to(mean.dtype).reciprocal()
        self.running_mean.lerp_(mean, share)
        # a batch's is made unbiased; the running one is, and moves by 0
        self.running_var.lerp_(var * (count / (count - 1)), live.to(var.dtype) * share)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, frozen={self.frozen}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # torch's batch norms have no flag; a copy: the caller's dict is not ours to add to
        state_dict = {prefix + "frozen": self.frozen, **state_dict}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class FreezableBatchNorm1d(_Freezable, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` whose statistics can be frozen: see :class:`FreezableBatchNorm2d`.

    Shapes: ``(n, channels)`` or ``(n, channels, length)``.
    """


class FreezableBatchNorm2d(_Freezable, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` whose statistics can be frozen while it trains.

    The flag is a buffer that is read where the data is: turning it costs no device sync, no new
    graph and no recompilation, and a captured CUDA graph follows it. Until it is set, training is
    that of torch's batch norm; from then on outputs and gradients are those of eval mode, the
    running statistics stay, and weight and bias go on learning. ``train()`` and ``eval()`` leave
    the flag alone.

    Of an empty batch there is nothing to count: the running statistics and their number stay.

    On the CPU, where the flag is at hand, the kernels are torch's. On a GPU it is read by a dozen
    small ops on the channels; of passes over the tensor there are one more than torch's, in the
    backward. A graph of ``torch.export`` that is to train has torch's elementwise operations.

    Args:
        As of torch's; ``track_running_stats`` has to be True.

    Shapes: ``(n, channels, height, width)``; any floating-point dtype that torch's takes.

    Buffers: ``frozen``: uint8, 0-d, 0 or 1; and torch's. A state_dict of torch's batch norm loads,
    and leaves the flag as it is.

    Raises:
        ValueError: ``track_running_stats=False``; in training, an input of one value per channel
            (frozen or not: the flag is not known there).
        RuntimeError: in a double backward, but in eager mode on the CPU.

    Source: ``torch.nn.BatchNorm2d``; ``freeze_bn_stats`` of ``torch.ao.nn.intrinsic.qat``, where
    the flag is one of Python.
    """


class FreezableBatchNorm3d(_Freezable, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` whose statistics can be frozen: see :class:`FreezableBatchNorm2d`.

    Shapes: ``(n, channels, depth, height, width)``.
    """


FREEZABLE = (FreezableBatchNorm1d, FreezableBatchNorm2d, FreezableBatchNorm3d)
_FREEZABLE_OF: dict[type, type[_Freezable]] = dict(
    zip((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), FREEZABLE, strict=True)
)


def make_batch_norm_freezable(model: nn.Module) -> None:
    """Turn every batch norm of a model into a :class:`FreezableBatchNorm2d` (1d, 3d), in place.

    Each stays the object it is, with its parameters, buffers and hooks, and gets the flag. Before
    ``torch.compile`` and the wrappers of distributed training, and after what looks for torch's
    own class: fusing layers, ``prepare_qat``.

    The fused modules of torch.ao (``ConvBn2d`` and the like) are left alone: they freeze theirs
    by a flag of Python, see :func:`switch`.

    Args:
        model: any module, also a batch norm itself; for a part of a model, that part.

    Raises:
        TypeError: no module.
        ValueError: names the batch norms that cannot be frozen: ``SyncBatchNorm``, lazy ones,
            classes of another make, ``track_running_stats=False``. Nothing has changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"make_batch_norm_freezable: model: expected a torch.nn.Module, got {model!r}"
        )
    plain = plain_batch_norms(model)
    refused = [
        f"{name or 'the model'} ({_shown(module)})"
        for name, module in plain.items()
        if type(module) not in _FREEZABLE_OF or module.running_mean is None
    ]
    if refused:
        raise ValueError(
            "make_batch_norm_freezable: model: expected torch's BatchNorm1d, 2d and 3d with "
            f"running statistics, got {', '.join(refused)}"
        )
    for module in plain.values():
        module.__class__ = _FREEZABLE_OF[type(module)]
        module._register_frozen()


def _shown(module: Any) -> str:
    stateless = type(module) in _FREEZABLE_OF  # and refused
    return type(module).__name__ + ", track_running_stats=False" * stateless


def plain_batch_norms(model: nn.Module) -> dict[str, Any]:
    """The batch norms of a model that nobody can freeze yet, by name."""
    served = {id(m) for owner in freezing_modules(model) for m in owner.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and id(module) not in served
    }


def freezing_modules(model: nn.Module) -> list[Any]:
    """The modules of a model that can freeze statistics, ours and torch.ao's fused ones."""
    return [module for module in model.modules() if hasattr(module, "freeze_bn_stats")]
