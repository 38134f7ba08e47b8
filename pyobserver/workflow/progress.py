"""A progress bar for the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")

_WIDTH = 30
_PERIOD = 0.1  # seconds between two drawings


def track(items: Iterable[Item], label: str, show: bool = True) -> Generator[Item, None, None]:
    """Pass ``items`` through and draw on stderr how many went by; quiet where that is no terminal.

    Items of unknown length are only counted. The bar is drawn ten times a second at most.
    """
    if not show or not sys.stderr.isatty():
        yield from items
        return
    try:
        total = len(items)  # type: ignore[arg-type]
    except TypeError:
        total = None
    done, start = 0, time.monotonic()
    drawn = start
    _draw(label, done, total, 0.0)
    try:
        for item in items:
            yield item
            done += 1
            now = time.monotonic()
            if now - drawn >= _PERIOD:
                _draw(label, done, total, now - start)
                drawn = now
    finally:
        _draw(label, done, total, time.monotonic() - start)
        sys.stderr.write("\n")


def _draw(label: str, done: int, total: int | None, seconds: float) -> None:
    rate = f"{done / seconds:.1f}/s" if seconds > 0 else ""
    if total:
        filled = min(_WIDTH, _WIDTH * done // total)
        bar = "#" * filled + "." * (_WIDTH - filled)
        line = f"{label} [{bar}] {done}/{total} {rate}"
    else:
        line = f"{label} {done} {rate}"
    sys.stderr.write(f"\r{line:<79}")
    sys.stderr.flush()
