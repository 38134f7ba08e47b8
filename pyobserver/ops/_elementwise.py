"""What the ops that map each element share: their output's layout, and one bit an element.

Bit i of a mask belongs to element i in the order of the output's memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without gap or overlap, in any order of axes."""
    expected = 1
    for stride, size in sorted(
        (stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return x.numel() > 0


def empty_output(x: Tensor) -> Tensor:
    """The output of an elementwise op: x's strides where x is dense, else contiguous."""
    if is_dense(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def is_laid_out_as_output(t: Tensor, x: Tensor) -> bool:
    """Whether a tensor has the strides of x's output."""
    return t.stride() == x.stride() if is_dense(x) else t.is_contiguous()


def mask_bytes(x: Tensor) -> int:
    return (x.numel() + 7) // 8


def pack_mask(flags: Tensor, y: Tensor) -> Tensor:
    """The bits of a tensor of bool, in the order of the output's memory."""
    bits = torch.zeros(mask_bytes(y) * 8, dtype=torch.uint8, device=y.device)
    in_memory = torch.empty_like(y, dtype=torch.bool).copy_(flags)
    bits[: y.numel()] = in_memory.as_strided((y.numel(),), (1,))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=y.device)
    return (bits.reshape(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, numel: int) -> Tensor:
    """0 and 1 of uint8, one for each element of the output's memory."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask.unsqueeze(1) >> shifts) & 1).reshape(-1)[:numel]


def check_dense_gradient(op: str, grad: Tensor) -> None:
    _checks.check_input(op, "grad", grad)
    if grad.numel() and not is_dense(grad):
        raise ValueError(
            f"{op}: grad: expected a dense tensor, laid out as the forward's output, "
            f"got shape {tuple(grad.shape)} with strides {grad.stride()}"
        )


def check_backward(op: str, grad: Tensor, mask: Tensor) -> None:
    check_dense_gradient(op, grad)
    _checks.check_state(op, "mask", mask, (torch.uint8,), mask_bytes(grad))
    _checks.check_same_device(op, grad, {"mask": mask})


def in_memory_order(grad: Tensor) -> Tensor:
    """A dense tensor's elements in the order of its memory."""
    return grad.as_strided((grad.numel(),), (1,), grad.storage_offset())


def with_strides(grad: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The gradient laid out as the output was, in whose order the bits of a mask lie."""
    if grad.stride() == strides:
        return grad
    # of grad, for it may be a batch of gradients
    return grad.new_empty_strided(grad.shape, strides).copy_(grad)
