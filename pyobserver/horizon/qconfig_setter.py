"""Which type each tensor of a model is quantized to."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..workflow.sites import near_matches
from .dtypes import QuantDType, qint16, quant_dtype
from .qconfig import QConfig
from .sites import Key, Sites

ROLES = ("input", "weight", "output")
Dtype = QuantDType | torch.dtype


class Plan:
    """The types that templates give to the tensors of a model.

    Attributes:
        sites: what is quantized, see :class:`Sites`.
        dtypes: the type of a fake-quantize; None: left in float; absent: that of the QConfig.
    """

    def __init__(self, sites: Sites):
        self.sites = sites
        self.dtypes: dict[Key, QuantDType | None] = {}

    def keys(self, name: str, role: str) -> list[Key]:
        """The fake-quantizes of a name in a role: of an input, those that it comes from."""
        if role == "input":
            return [key for grid in self.sites.inputs.get(name, ()) for key in grid]
        return [key for key in self.sites.names.get(name, ()) if key.role == role]

    def below(self, owner: str, prefix: str) -> list[str]:
        """The names that are a prefix or go on from it with a dot; all for ``""``.

        Raises:
            ValueError: none; says what is near.
        """
        names = list(dict.fromkeys((*self.sites.names, *self.sites.inputs)))
        taken = [name for name in names if not prefix or f"{name}.".startswith(f"{prefix}.")]
        if not taken:
            parents = {parent for name in names for parent in _parents(name)}
            raise ValueError(
                f"{owner}: expected the name of what is quantized, got {prefix!r}; "
                f"{near_matches(prefix, [*names, *sorted(parents)])}"
            )
        return taken

    def set(self, keys: Iterable[Key], dtype: QuantDType | None) -> None:
        """Give a type to fake-quantizes; the last one given counts."""
        self.dtypes.update(dict.fromkeys(keys, dtype))


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


class Template(ABC):
    """A rule that gives types to the tensors of a model."""

    @abstractmethod
    def apply(self, plan: Plan) -> None:
        """Write the types into the plan.

        Raises:
            ValueError: a name that the model does not have.
        """


class ModuleNameTemplate(Template):
    """Types by the names of modules.

    Args:
        dtypes: by a name, which stands for all below it too (``""``: the whole model); the longer
            name wins. A type is that of results; a mapping of roles (``"input"``, ``"weight"``,
            ``"output"``) gives more, and of inputs a list gives one each. ``torch.float32`` leaves
            a tensor in float.

    Raises:
        TypeError, ValueError: a role or type that does not exist.
    """

    def __init__(self, dtypes: Mapping[str, Any]):
        owner = type(self).__name__
        if not isinstance(dtypes, Mapping):
            raise TypeError(
                f"{owner}: dtypes: expected a mapping of names to types, got {dtypes!r}"
            )
        self.dtypes: dict[str, dict[str, Any]] = {}
        for name, given in dtypes.items():
            if not isinstance(name, str):
                raise TypeError(f"{owner}: dtypes: expected names of modules, got {name!r}")
            roles = given if isinstance(given, Mapping) else {"output": given}
            for role in roles:
                _check_role(owner, role)
            self.dtypes[name] = {
                role: [_dtype(owner, "dtypes", one) for one in dtype]
                if role == "input" and isinstance(dtype, (list, tuple))
                else _dtype(owner, "dtypes", dtype)
                for role, dtype in roles.items()
            }

    def apply(self, plan: Plan) -> None:
        owner = type(self).__name__
        for prefix in sorted(self.dtypes, key=len):
            names = plan.below(owner, prefix)
            for role, dtype in self.dtypes[prefix].items():
                if isinstance(dtype, list):
                    for name in names:
                        _set_inputs(plan, name, dtype)
                    continue
                keys = [key for name in names for key in plan.keys(name, role)]
                if not keys:
                    raise ValueError(
                        f"{owner}: expected a name with a quantized {role}, got {prefix!r}"
                    )
                plan.set(keys, dtype)


class ConvDtypeTemplate(Template):
    """Types of convolutions, transposed ones and linear layers, as modules and as functions.

    Args:
        input_dtype: of what they take, so of the results that it comes from; None: as it is.
        weight_dtype: of their weights; None: as it is.
    """

    def __init__(self, input_dtype: Dtype | None = None, weight_dtype: Dtype | None = None):
        owner = type(self).__name__
        given = {"input": input_dtype, "weight": weight_dtype}
        self.dtypes = {
            role: _dtype(owner, f"{role}_dtype", one)
            for role, one in given.items()
            if one is not None
        }

    def apply(self, plan: Plan) -> None:
        for name, kind in plan.sites.kinds.items():
            if kind != "linear":
                continue
            if "input" in self.dtypes:
                _set_inputs(plan, name, [self.dtypes["input"]])
            if "weight" in self.dtypes:
                plan.set(plan.keys(name, "weight"), self.dtypes["weight"])


class MatmulDtypeTemplate(Template):
    """Types of what matrix products take (``matmul``, ``@``, ``bmm``, ``mm``).

    Args:
        input_dtypes: one type, or one for each of the two operands. A parameter is an operand's
            weight, and not meant.
    """

    def __init__(self, input_dtypes: Dtype | Sequence[Dtype]):
        owner = type(self).__name__
        given = input_dtypes if isinstance(input_dtypes, (list, tuple)) else [input_dtypes] * 2
        if len(given) != 2:
            raise ValueError(f"{owner}: input_dtypes: expected one type or two, got {input_dtypes}")
        self.dtypes = [_dtype(owner, "input_dtypes", one) for one in given]

    def apply(self, plan: Plan) -> None:
        for name, kind in plan.sites.kinds.items():
            if kind == "matmul":
                _set_inputs(plan, name, self.dtypes)


class SensitivityTemplate(Template):
    """A higher type for the most sensitive tensors.

    Args:
        sensitive_list: ``(name, role)`` from the most to the least sensitive, as of
            :func:`pyobserver.horizon.sensitivity`; what follows in a tuple is not looked at.
        ratio: how many of the list: a float is a share of it (rounded up; 1.0: all), an integer a
            number (1: the first).
        dtype: the type they get.

    Raises:
        TypeError, ValueError: an argument; names it, what was expected and what came.
    """

    def __init__(
        self,
        sensitive_list: Iterable[Sequence[Any]],
        ratio: float | int = 1.0,
        dtype: Dtype = qint16,
    ):
        owner = type(self).__name__
        listed = _listed(owner, "sensitive_list", "pairs of a name and a role", sensitive_list)
        for one in listed:
            if not isinstance(one, (tuple, list)) or len(one) < 2 or not isinstance(one[0], str):
                raise TypeError(
                    f"{owner}: sensitive_list: expected pairs of a name and a role, got {one!r}"
                )
            _check_role(owner, one[1])
        self.sensitive_list = [(one[0], one[1]) for one in listed]
        self.count = _count(owner, ratio, len(listed))
        self.dtype = _dtype(owner, "dtype", dtype)

    def apply(self, plan: Plan) -> None:
        owner = type(self).__name__
        for name, role in self.sensitive_list[: self.count]:
            keys = plan.keys(name, role)
            if not keys:
                plan.below(owner, name)  # raises of a name that is none
                roles = sorted({key.role for key in plan.sites.names.get(name, ())})
                had = f"it has {', '.join(roles)}" if roles else "it holds others that are"
                raise ValueError(
                    f"{owner}: expected a name with a quantized {role}, got {name!r}: {had}"
                )
            plan.set(keys, self.dtype)


class QconfigSetter:
    """The QConfig of a model, and the templates that give types to its tensors.

    Args:
        reference_qconfig: the fake-quantizes that all tensors get.
        templates: applied in order, the later wins.

    Raises:
        TypeError: an argument of another kind.
    """

    def __init__(self, reference_qconfig: QConfig, templates: Sequence[Template] = ()):
        if not isinstance(reference_qconfig, QConfig):
            raise TypeError(
                f"QconfigSetter: reference_qconfig: expected a QConfig, got {reference_qconfig!r}"
            )
        self.templates = tuple(_listed("QconfigSetter", "templates", "templates", templates))
        for template in self.templates:
            if not isinstance(template, Template):
                raise TypeError(
                    f"QconfigSetter: templates: expected templates, got {template!r} among them"
                )
        self.reference_qconfig = reference_qconfig

    def plan(self, sites: Sites) -> Plan:
        """The types of what is quantized in a model."""
        plan = Plan(sites)
        for template in self.templates:
            template.apply(plan)
        return plan


def _check_role(owner: str, role: Any) -> None:
    if role not in ROLES:
        raise ValueError(f"{owner}: expected one of the roles {', '.join(ROLES)}, got {role!r}")


def _listed(owner: str, name: str, what: str, given: Any) -> list[Any]:
    if not isinstance(given, Iterable):
        raise TypeError(f"{owner}: {name}: expected {what}, got {given!r}")
    return list(given)


def _dtype(owner: str, name: str, dtype: Any) -> QuantDType | None:
    """A quantized type; None for ``torch.float32``."""
    return None if dtype is torch.float32 else quant_dtype(owner, dtype, name)


def _set_inputs(plan: Plan, name: str, dtypes: Sequence[QuantDType | None]) -> None:
    for grid, dtype in zip(plan.sites.inputs.get(name, ()), dtypes, strict=False):
        plan.set(grid, dtype)


def _count(owner: str, ratio: float | int, length: int) -> int:
    if isinstance(ratio, int) and not isinstance(ratio, bool) and 0 <= ratio <= length:
        return ratio
    if isinstance(ratio, float) and 0.0 <= ratio <= 1.0:
        return math.ceil(ratio * length)
    raise ValueError(
        f"{owner}: ratio: expected a share in [0.0, 1.0] or a number up to {length}, got {ratio!r}"
    )
