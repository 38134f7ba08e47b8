"""The chip that a model is for, which nothing here depends on."""

from __future__ import annotations

import enum
import warnings


class March(enum.Enum):
    """Horizon's chips."""

    BERNOULLI2 = "bernoulli2"
    BAYES = "bayes"
    BAYES_E = "bayes-e"
    META = "meta"
    NASH_B = "nash-b"
    NASH_E = "nash-e"
    NASH_H = "nash-h"
    NASH_M = "nash-m"
    NASH_P = "nash-p"


def set_march(march: March | str) -> None:
    """Accept the chip of a model, and ignore it, saying so.

    Raises:
        ValueError: no :class:`March`, nor the value of one.
    """
    try:
        chip = March(march)
    except ValueError:
        known = ", ".join(one.value for one in March)
        raise ValueError(f"set_march: march: expected one of {known}, got {march!r}") from None
    warnings.warn(f"set_march: {chip.value} is ignored: nothing here is for one chip", stacklevel=2)
