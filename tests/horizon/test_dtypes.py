from __future__ import annotations

import copy
import pickle

import pytest
import torch

from pyobserver.horizon import QuantDType, qinfo, qint4, qint8, qint16


@pytest.mark.parametrize(
    ("dtype", "bits", "least", "greatest"),
    [(qint4, 4, -8, 7), (qint8, 8, -128, 127), (qint16, 16, -32768, 32767)],
)
def test_qinfo(dtype: QuantDType, bits: int, least: int, greatest: int) -> None:
    info = qinfo(dtype)
    assert (info.bits, info.min, info.max) == (bits, least, greatest)
    stored = torch.iinfo(dtype.storage)
    assert stored.min <= least
    assert greatest <= stored.max
    assert repr(dtype) == f"qint{bits}"


def test_torch_dtypes_are_taken() -> None:
    assert qinfo(torch.int8).dtype is qinfo(torch.qint8).dtype is qint8
    assert qinfo(torch.int16).dtype is qint16
    assert qinfo(torch.int4).dtype is qint4


@pytest.mark.parametrize("dtype", [torch.uint8, torch.quint8, torch.float32, "qint8", None, 8])
def test_others_are_refused_by_name(dtype: object) -> None:
    with pytest.raises(ValueError, match=r"dtype: expected one of qint4, qint8, qint16, .*, got"):
        qinfo(dtype)


def test_a_type_is_one_object() -> None:
    assert copy.deepcopy(qint8) is qint8
    assert pickle.loads(pickle.dumps(qint16)) is qint16
