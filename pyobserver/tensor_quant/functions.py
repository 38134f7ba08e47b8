"""The functions by the names of their autograd functions."""

from __future__ import annotations

from ..ops.tensor_quant import fake_tensor_quant, tensor_quant


class TensorQuantFunction:
    """``TensorQuantFunction.apply`` is :func:`pyobserver.ops.tensor_quant`.

    Source: the class of this name of NVIDIA's pytorch-quantization, an autograd function.
    """

    apply = staticmethod(tensor_quant)


class FakeTensorQuantFunction:
    """``FakeTensorQuantFunction.apply`` is :func:`pyobserver.ops.fake_tensor_quant`.

    Source: as :class:`TensorQuantFunction`.
    """

    apply = staticmethod(fake_tensor_quant)
