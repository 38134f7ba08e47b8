"""How long a training step takes, each contender's beside the base's."""

from __future__ import annotations

import gc
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from ..cases import Call
from ..timing import cpu_clock
from .models import ALIKE, BASE, MODELS, contenders, prepared, sites, step_of
from .report import StepTime

_WARM_UP = 5  # steps
_PARTS = 5  # of a run, each with a median of its own
_SECONDS, _LEAST, _MOST = 40.0, 40, 500  # of a run, and its rounds
_QUICK_BATCH = 2


def in_turns(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, round by round.

    In each round everyone has one turn, in an order drawn anew, so that nobody always comes after
    the same neighbour, whose tensors are what it finds in the cache.
    """
    clock = cpu_clock()
    found: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffled = list(calls), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffled.shuffle(order)
            for name in order:
                begin = clock()
                calls[name]()
                found[name].append(clock() - begin)
    finally:
        gc.enable()
    return found


def _rounds(steps: Mapping[str, Call], quick: bool) -> int:
    if quick:
        return _PARTS
    once = sum(times[0] for times in in_turns(steps, 1).values())
    return max(_LEAST, min(int(_SECONDS / once), _MOST))


def _part_medians(values: Sequence[float]) -> tuple[float, ...]:
    bounds = [len(values) * part // _PARTS for part in range(_PARTS + 1)]
    return tuple(statistics.median(values[begin:end]) for begin, end in pairwise(bounds))


def _warm_up(steps: Mapping[str, Call]) -> None:
    """And see that those who should give the same numbers do."""
    losses = {name: [float(step()) for _ in range(_WARM_UP)] for name, step in steps.items()}
    for ours, theirs, count in ALIKE:
        if theirs in losses:
            mine, other = losses[ours][count - 1], losses[theirs][count - 1]
            if not abs(mine / other - 1) < 1e-3:
                sys.exit(f"loss of step {count}: {ours}: {mine}, {theirs}: {other}")


def time_steps(model: str, dtype: str, threads: int, quick: bool) -> list[StepTime]:
    """A row for each contender."""
    torch.set_num_threads(threads)
    trained = MODELS[model]
    batch = _QUICK_BATCH if quick else trained.batch
    made = {name: prepared(trained, name, batch) for name in contenders(dtype)}
    steps = {name: step_of(*model_and_input, dtype) for name, model_and_input in made.items()}
    _warm_up(steps)
    found = in_turns(steps, _rounds(steps, quick))
    rows = []
    for name, seconds in found.items():
        more = [time - base for time, base in zip(seconds, found[BASE], strict=True)]
        first, overhead, third = statistics.quantiles(more, n=4)
        rows.append(
            StepTime(
                model=model,
                dtype=dtype,
                threads=threads,
                contender=name,
                sites=sites(made[name][0]),
                seconds=statistics.median(seconds),
                overhead=overhead,
                quartiles=(first, third),
                parts=_part_medians(more),
            )
        )
    return rows
