"""``with_args`` and ``with_callable_args``: constructors with some of their arguments bound."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..compat.hosts import host_classes, register_with_hosts

_faces: dict[tuple[type, ...], type] = {}


class ObserverFactory:
    """A constructor of observers or fake-quantizers with keyword arguments bound.

    torch.ao and torchao ask ``isinstance`` of their own wrapper classes, and neither need be
    imported when a factory is made. So a factory answers ``__class__`` at the time it is asked:
    with a class that derives from the wrappers of the frameworks that are loaded by then.

    Attributes:
        p: the ``functools.partial`` (the name is that of the frameworks' own wrappers).
        callable_args: arguments that are called, and their results passed, at construction.
    """

    def __init__(
        self, p: Callable[..., Any], callable_args: dict[str, Callable[[], Any]] | None = None
    ):
        self.p = p
        self.callable_args = dict(callable_args or {})

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        wrappers = host_classes("_PartialWrapper", "PartialWrapper")
        if wrappers not in _faces:
            _faces[wrappers] = type("ObserverFactory", (ObserverFactory, *wrappers), {})
        return _faces[wrappers]

    @property
    def __name__(self) -> str:
        target = self.p
        while isinstance(target, partial):
            target = target.func
        return target.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        register_with_hosts()
        late = {name: make() for name, make in self.callable_args.items() if name not in kwargs}
        return self.p(*args, **{**late, **kwargs})

    def with_args(self, **kwargs: Any) -> ObserverFactory:
        return ObserverFactory(partial(self.p, **kwargs), self.callable_args)

    def with_callable_args(self, **kwargs: Callable[[], Any]) -> ObserverFactory:
        return ObserverFactory(self.p, {**self.callable_args, **kwargs})

    def __repr__(self) -> str:
        return f"{self.p!r}{self.callable_args!r}"

    def __reduce__(self) -> tuple[Any, ...]:
        return ObserverFactory, (self.p, self.callable_args)


class FactoryMixin:
    """Gives a class ``with_args`` and ``with_callable_args``."""

    @classmethod
    def with_args(cls, **kwargs: Any) -> ObserverFactory:
        """A factory of this class with keyword arguments bound; factories can be bound further.

        Source: ``torch.ao.quantization.observer._with_args``.
        """
        return ObserverFactory(partial(cls, **kwargs))

    @classmethod
    def with_callable_args(cls, **kwargs: Callable[[], Any]) -> ObserverFactory:
        """A factory whose given arguments are called when an instance is made.

        Source: ``torch.ao.quantization.observer._with_callable_args``.
        """
        return ObserverFactory(partial(cls), kwargs)
