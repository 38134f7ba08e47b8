"""The fake-quantize module whose scale and zero point are learned: LSQ and LSQ+."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import ranges
from .compat.hosts import host_classes
from .dtypes import check_qscheme
from .fake_quantize import FakeQuantize, FusedMovingAvgObsFakeQuantize
from .observers import (
    FixedQParamsObserver,
    MovingAverageMinMaxObserver,
    UniformQuantizationObserverBase,
)
from .observers.histogram_base import HistogramObserverBase
from .ops._blocks import split
from .ops.learnable_fake_quantize import _rounded, learnable_fake_quantize, usable_scale
from .ops.recomputation import unless_recomputing

__all__ = ["LearnableFakeQuantize", "enable_param_learning", "make_learnable"]

_SERVED = (
    torch.per_tensor_affine,
    torch.per_tensor_symmetric,
    torch.per_channel_affine,
    torch.per_channel_symmetric,
)
_EPS = torch.finfo(torch.float32).eps


class LearnableFakeQuantize(FakeQuantize):
    """Quantize to integers and back with a scale and a zero point that are learned.

    While the observer is on, as it is at first, every forward observes, takes scale and zero point
    from the observer, and gives them a gradient of 0. Once it is off they are the optimizer's:
    ``model.apply(po.disable_observer)`` or ``model.apply(po.enable_param_learning)`` is the step
    from calibration to learning. Without calibration, :meth:`initialize_from` gives them a start.

    A scale is used as at least ``least_scale`` (the observer's ``eps``) and at most the greatest
    float32, inside the op, whatever the optimizer made of the parameter, which gets the gradient
    of the one used; so a bad step is no error, and no sync. One that is NaN makes NaN. A zero point
    is rounded to an integer of the grid.

    **The parameters exist from the start**, so that an optimizer may be built at once: ``(1,)``
    per tensor, ``(num_channels,)`` per channel where the observer was told ``num_channels``. Else
    the first tensor, a state_dict or :meth:`initialize_from` sizes them, in place: they stay the
    objects that the optimizer holds. Per block (``observer=PerBlockMinMaxObserver``,
    ``block_size=32`` for groups of 32 in the rows of a matrix) they are shaped as the grid of
    blocks, from the start where the observer was told ``shape``. Tell either to shard, to wrap in
    DDP, to compile or to export before the first tensor.

    Under FSDP2 calibrate before ``fully_shard``: an estimate goes to the gathered parameters, which
    are thrown away. Ranks that calibrate on data of their own (DDP) have scales of their own until
    ``po.distributed.sync(model)`` and ``initialize_from()`` of each module.

    Args:
        observer, quant_min, quant_max, is_dynamic, observer_kwargs: as for :class:`FakeQuantize`,
            with an integer zero point.
        grad_factor: what the gradients of scale and zero point are multiplied by: a number, or
            LSQ's ``1 / sqrt(n * Qp)``, where Qp is ``quant_max`` less the zero point of a symmetric
            scheme, and n the number of values that a scale quantizes: ``"elements"``: all of them,
            as of a weight; ``"features"``: those of one sample, along the first dimension, as of an
            activation, so that the factor does not depend on the size of the batch.

    Parameters: ``scale``: float32; ``zero_point``: float32, of an affine scheme (LSQ+). A symmetric
    one has a buffer of that name, float32, which is not learned (LSQ).

    Buffers: ``fake_quant_enabled``, ``observer_enabled``.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020; Bhalgat et al., "LSQ+",
    CVPR Workshops 2020; ``torch.ao.quantization._learnable_fake_quantize._LearnableFakeQuantize``,
    whose state_dict loads here, and whose methods are here but ``observe_quant_params``.
    """

    _serves_blocks = True

    def __init__(
        self,
        observer: Any = MovingAverageMinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
        grad_factor: float | str = "elements",
        **observer_kwargs: Any,
    ):
        super().__init__(observer, quant_min, quant_max, is_dynamic, **observer_kwargs)
        owner = type(self).__name__
        check_qscheme(owner, self.qscheme, _SERVED)
        watcher = self.activation_post_process
        self.symmetric_zero_point = (
            getattr(watcher, "_symmetric_zero_point", 0) if self.is_symmetric_quant else None
        )
        self.grad_factor = grad_factor
        self._factor, self._normalize = self._lsq_factor(owner, grad_factor)
        self.least_scale = _least_scale(watcher)
        self._watches = True
        self._axis = self.ch_axis if self.is_per_channel else None
        self.block_size = getattr(watcher, "block_size", None)
        scale, zero_point = self._buffers.pop("scale"), self._buffers.pop("zero_point").float()
        if self.block_size is not None and watcher.min_val.numel() > 0:
            scale, zero_point = (t.reshape(watcher.min_val.shape) for t in (scale, zero_point))
        self.scale = nn.Parameter(scale)
        if self.symmetric_zero_point is None:
            self.zero_point = nn.Parameter(zero_point)
        else:
            self.register_buffer("zero_point", zero_point.fill_(self.symmetric_zero_point))
        if isinstance(watcher, FixedQParamsObserver):
            self._write(watcher.scale, watcher.zero_point)

    def _lsq_factor(self, owner: str, grad_factor: float | str) -> tuple[float, str]:
        """``grad_factor`` and ``normalize`` of the op."""
        if grad_factor in ("elements", "features"):
            steps = self.quant_max - (self.symmetric_zero_point or 0)
            return 1 / math.sqrt(max(steps, 1)), str(grad_factor)
        if isinstance(grad_factor, (int, float)) and not isinstance(grad_factor, bool):
            return float(grad_factor), "none"
        raise ValueError(
            f"{owner}: grad_factor: expected a number, 'elements' or 'features', "
            f"got {grad_factor!r}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x`` rounded to the grid, shaped as x; while the observer is on, updates the scale."""
        if x.numel() == 0:
            return self._of_nothing(x)
        own = self.__dict__  # an attribute of an nn.Module costs a fiftieth of the call
        buffers = own["_buffers"]
        watched = None
        if own["_watches"]:
            watched = buffers["observer_enabled"]
            self._observe(x, unless_recomputing(watched))
        scale, zero_point = self.scale, self.zero_point
        if scale.dtype != torch.float32 or zero_point.dtype != torch.float32:
            scale, zero_point = scale.float(), zero_point.float()  # mixed precision's copies
        return learnable_fake_quantize(
            x,
            scale,
            zero_point,
            own["quant_min"],
            own["quant_max"],
            own["_axis"],
            own["_factor"],
            own["block_size"],
            buffers["fake_quant_enabled"],
            watched,
            own["least_scale"],
            own["_normalize"],
        )

    def _observe(self, x: Tensor, enabled: Tensor) -> None:
        if not isinstance(self.activation_post_process, FixedQParamsObserver):
            super()._observe(x, enabled)

    def _of_nothing(self, x: Tensor) -> Tensor:
        """The parameters have a gradient of 0: DDP waits for one, on every rank."""
        if not torch.is_grad_enabled():
            return x
        learned = [p for p in (self.scale, self.zero_point) if p.requires_grad]
        return sum(((p.sum() * 0.0).to(x.dtype) for p in learned), start=x)

    def _choose_qparams(self, watcher: Any, enabled: Tensor) -> None:
        enabled = (enabled != 0) & (self.observer_enabled != 0)  # off, they are the optimizer's
        if not isinstance(watcher, UniformQuantizationObserverBase):
            self._write(*watcher.calculate_qparams())
            return
        self._resize(watcher.min_val)
        scale, zero_point = self.scale.detach(), self.zero_point.detach()
        if scale.dtype == torch.float32:
            watcher.write_qparams(scale, zero_point, enabled)
            return
        chosen = scale.float(), zero_point.float()
        watcher.write_qparams(*chosen, enabled)
        self._write(*chosen)

    def _resize(self, like: Tensor) -> None:
        """To the shape of another tensor; the parameters stay the objects that they are."""
        shape = like.shape or torch.Size((1,))
        for t, value in ((self.scale, 1), (self.zero_point, self.symmetric_zero_point or 0)):
            if t.shape != shape:
                with torch.inference_mode(False):
                    one = t.detach().flatten() if t.numel() == 1 else t.new_full((1,), value)
                    t.grad = None  # of an empty batch, and of the other shape
                    t.data = one.expand(shape.numel()).reshape(shape).clone()

    @torch.no_grad()
    def _write(self, scale: Tensor, zero_point: Tensor) -> None:
        self._resize(scale)
        self.scale.copy_(scale.reshape(self.scale.shape))
        self.zero_point.copy_(zero_point.reshape(self.zero_point.shape))

    @torch.no_grad()
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The scale and zero point that forward rounds with: float32 and int32, as the parameters
        are shaped."""
        scale, zero_point = self.scale.float(), self.zero_point.float()
        return (
            usable_scale(scale, zero_point, self.least_scale),
            _rounded(zero_point, self.quant_min, self.quant_max),
        )

    def initialize_from(
        self, source: Any = None, method: str | None = None, **options: Any
    ) -> LearnableFakeQuantize:
        """Give the parameters a start to learn from, and turn the observer off.

        Args:
            source: what the scale and zero point come from:

                - None: the module's own observer, as after :func:`pyobserver.distributed.sync`;
                - another observer, by its ``calculate_qparams``, or, of a histogram, by ``method``;
                - a :class:`pyobserver.ranges.Histogram`, by ``method``, for the module's grid;
                - a :class:`pyobserver.Site` of a calibration, of the module's grid;
                - a fake-quantize: what it rounds with;
                - a pair of scale and zero point, tensors or numbers;
                - a tensor of data: LSQ's ``2 * mean(|x|) / sqrt(Qp)`` of each scale's values. An
                  affine zero point puts the least value, if negative, on ``quant_min``.
            method, options: see :func:`pyobserver.ranges.solve`; without, a histogram is solved for
                the least squared error.

        Returns:
            The module itself.

        Raises:
            TypeError: no such source.
            ValueError: values that are not those of this module's grid, or do not fit its shape;
                the parameters are as they were.
        """
        owner = f"{type(self).__name__}.initialize_from"
        source = self.activation_post_process if source is None else source
        grid = {
            "quant_min": self.quant_min,
            "quant_max": self.quant_max,
            "symmetric": self.is_symmetric_quant,
        }
        if isinstance(source, ranges.Histogram):
            solution = ranges.solve(source, method or "mse", **grid, **options)
            found = solution.scale, solution.zero_point
        elif isinstance(source, HistogramObserverBase) and method is not None:
            solution = source.solve(method, **grid, **options)
            found = solution.scale, solution.zero_point
        elif method is not None or options:
            raise TypeError(
                f"{owner}: method: expected None beside {type(source).__name__}, which keeps no "
                f"histogram, got {method!r}"
            )
        elif isinstance(source, Tensor):
            found = self._lsq_start(source)
        elif isinstance(source, tuple) and len(source) == 2:
            found = torch.as_tensor(source[0]), torch.as_tensor(source[1])
        elif hasattr(source, "scale") and hasattr(source, "zero_point"):
            self._check_grid(owner, source)
            found = source.scale.detach(), source.zero_point.detach()
        elif hasattr(source, "calculate_qparams"):
            self._check_grid(owner, source)
            found = source.calculate_qparams()
        else:
            raise TypeError(
                f"{owner}: source: expected an observer, a histogram, a site, a fake-quantize, a "
                f"pair of scale and zero point, or data, got {type(source).__name__}"
            )
        self._check_start(owner, *found)
        self._write(*found)
        self.disable_observer()
        self._leave_observer_out()
        return self

    def _check_grid(self, owner: str, source: Any) -> None:
        expected = self.quant_min, self.quant_max
        got = source.quant_min, source.quant_max
        if expected != got:
            raise ValueError(
                f"{owner}: source: expected the grid [{expected[0]}, {expected[1]}], "
                f"got one of [{got[0]}, {got[1]}]"
            )

    def _check_start(self, owner: str, scale: Tensor, zero_point: Tensor) -> None:
        shape = tuple(self.scale.shape)
        dims = 1 if self.block_size is None else len(self.block_size)
        fits = scale.numel() == 1 if self._axis is None and dims == 1 else scale.dim() == dims
        if math.prod(shape) > 1:
            fits = tuple(scale.shape) == shape
        if not fits or scale.numel() != zero_point.numel() or scale.numel() == 0:
            raise ValueError(
                f"{owner}: source: expected scales and zero points shaped as the module's, "
                f"{shape}, got shapes {tuple(scale.shape)} and {tuple(zero_point.shape)}"
            )
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError(
                f"{owner}: source: expected positive finite scales, got {scale.tolist()}"
            )
        low, high = self.quant_min, self.quant_max
        if not bool(((zero_point >= low) & (zero_point <= high)).all()):
            raise ValueError(
                f"{owner}: source: expected zero points in [{low}, {high}], "
                f"got {zero_point.tolist()}"
            )
        fixed = self.symmetric_zero_point
        if fixed is not None and not bool((zero_point == fixed).all()):
            raise ValueError(
                f"{owner}: source: expected zero points of {fixed}, as the scheme is symmetric, "
                f"got {zero_point.tolist()}"
            )

    @torch.no_grad()
    def _lsq_start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        view, within, shape = split(x.float(), self._axis, self.block_size)
        groups = [size for d, size in enumerate(shape) if d not in within] or [1]
        rows = view.movedim(within, tuple(range(-len(within), 0))).reshape(*groups, -1)
        steps = max(self.quant_max - (self.symmetric_zero_point or 0), 1)
        scale = (2 * rows.abs().mean(-1) / math.sqrt(steps)).clamp(min=self.least_scale)
        if self.symmetric_zero_point is not None:
            return scale, torch.full_like(scale, self.symmetric_zero_point)
        below = (rows.amin(-1).clamp(max=0.0) / scale).round()
        return scale, (self.quant_min - below).clamp(self.quant_min, self.quant_max)

    @classmethod
    def from_fake_quantize(
        cls, fake_quantize: Any, grad_factor: float | str = "elements"
    ) -> LearnableFakeQuantize:
        """One that takes a fake-quantize's place: its observer, its switches and its values.

        Args:
            fake_quantize: a :class:`FakeQuantize` or :class:`FusedMovingAvgObsFakeQuantize`, ours
                or a host's.
            grad_factor: see the class.

        Raises:
            TypeError: something else, as one of fixed parameters, or of another class over these.
        """
        if not _is_replaceable(fake_quantize):
            raise TypeError(
                f"{cls.__name__}.from_fake_quantize: fake_quantize: expected a FakeQuantize, "
                f"got {type(fake_quantize).__name__}"
            )
        made = cls(lambda: fake_quantize.activation_post_process, grad_factor=grad_factor)
        made._write(fake_quantize.scale, fake_quantize.zero_point)
        made.to(fake_quantize.scale.device)
        made.fake_quant_enabled.copy_(fake_quantize.fake_quant_enabled)
        made.observer_enabled.copy_(fake_quantize.observer_enabled)
        return made.train(fake_quantize.training)

    def enable_param_learning(self) -> LearnableFakeQuantize:
        """Learn: the observer off, rounding on, the parameters with a gradient.

        Forward leaves the observer out, where ``disable_observer`` has its kernels read a switch:
        that saves half of a small call, and what was compiled before is compiled anew, once.
        ``enable_observer`` puts it back.
        """
        self._leave_observer_out()
        return self.toggle_qparam_learning().toggle_fake_quant().toggle_observer_update(False)

    def _leave_observer_out(self) -> None:
        one_scale = self._axis is None and self.block_size is None
        # it sizes the parameters, where they are not yet
        self._watches = not one_scale and self.scale.numel() == 1

    def enable_observer(self, enabled: bool = True) -> None:
        self._watches = self._watches or enabled
        super().enable_observer(enabled)

    def enable_static_estimate(self) -> LearnableFakeQuantize:
        """Take the scale from the observer: it is on, rounding too, the parameters without one."""
        return self.toggle_qparam_learning(False).toggle_fake_quant().toggle_observer_update()

    def enable_static_observation(self) -> LearnableFakeQuantize:
        """Observe alone: values pass as they are."""
        return self.toggle_qparam_learning(False).toggle_fake_quant(False).toggle_observer_update()

    def toggle_qparam_learning(self, enabled: bool = True) -> LearnableFakeQuantize:
        """Whether the parameters require a gradient; a compiled graph is compiled anew for it."""
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(enabled)
        return self

    def toggle_observer_update(self, enabled: bool = True) -> LearnableFakeQuantize:
        self.enable_observer(enabled)
        return self

    def toggle_fake_quant(self, enabled: bool = True) -> LearnableFakeQuantize:
        self.enable_fake_quant(enabled)
        return self

    def reset_parameters(self) -> None:
        """As made: the scale 1, the observer on and unfed; as after ``to_empty``."""
        with torch.no_grad():
            self.scale.fill_(1)
            self.zero_point.fill_(self.symmetric_zero_point or 0)
        self.enable_fake_quant()
        self.enable_observer()
        watcher = self.activation_post_process
        if isinstance(watcher, UniformQuantizationObserverBase):
            watcher.eps.fill_(self.least_scale)
            watcher.reset_min_max_vals()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        self._watches = True  # what is loaded may have the observer on
        state_dict = dict(state_dict)  # the caller's is not ours to change
        for name in ("scale", "zero_point"):
            if (saved := state_dict.get(prefix + name)) is not None:
                state_dict[prefix + name] = saved.float().reshape(saved.shape or (1,))
        # torch.ao's
        if (static := state_dict.pop(prefix + "static_enabled", None)) is not None:
            state_dict[prefix + "observer_enabled"] = static
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def _is_replaceable(module: Any) -> bool:
    """Whether it is a fake-quantize, ours or a host's, and none of a class with ways of its own."""
    names = ("FakeQuantize", "FusedMovingAvgObsFakeQuantize")
    return type(module) in (FakeQuantize, FusedMovingAvgObsFakeQuantize, *host_classes(*names))


def _least_scale(watcher: Any) -> float:
    eps = getattr(watcher, "eps", _EPS)
    if isinstance(eps, Tensor):
        return _EPS if eps.is_meta else float(eps)
    return float(eps)


def enable_param_learning(mod: nn.Module) -> None:
    """From calibration to learning: ``model.apply(enable_param_learning)``."""
    if isinstance(mod, LearnableFakeQuantize):
        mod.enable_param_learning()


def make_learnable(model: nn.Module, grad_factor: float | str = "elements") -> nn.Module:
    """Put a learnable one in place of every fake-quantize of a model, in place.

    Each keeps the observer, the switches and the values of the one before, so that a model that was
    calibrated is ready to learn once its observers are off. One that is used twice stays one.

    Args:
        model: a model prepared with :class:`FakeQuantize` or
            :class:`FusedMovingAvgObsFakeQuantize`, ours or a host's; all others stay.
        grad_factor: see :class:`LearnableFakeQuantize`.

    Returns:
        The model, or, where that is a fake-quantize itself, the one in its place.
    """
    made: dict[nn.Module, nn.Module] = {}

    def learnable(module: nn.Module) -> nn.Module:
        if not _is_replaceable(module):
            return module
        if module not in made:
            made[module] = LearnableFakeQuantize.from_fake_quantize(module, grad_factor)
        return made[module]

    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None:
                parent._modules[name] = learnable(child)
    return learnable(model)
