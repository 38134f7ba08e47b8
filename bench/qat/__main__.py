"""``python -m bench.qat``: what fake-quantize adds to training, ours beside torch.ao's."""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..__main__ import counts, facts
from ..memory import RESOLUTION
from ..report import write
from ..timing import keep_memory_warm
from . import calls, memory
from .models import DTYPES, MODELS, contenders
from .report import Key, Record, markdown
from .steps import time_steps

_WARM_ELEMENTS = 4_000_000


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.qat", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small batches: that it runs")
    parser.add_argument("--threads", type=counts, default=(1, 2), metavar="N,N", help="of torch")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--steps-alone", action="store_true", help="neither small tensors nor memory"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.md", help="instead of stdout; and FILE.json beside it"
    )
    return parser.parse_args()


def _notes(warm: bool) -> str:
    pages = "kept (its page faults are not timed)" if warm else "given back (page faults are timed)"
    return (
        "A step is forward, backward, SGD and dropping the gradients. Medians of CPU time on one "
        "thread, of wall-clock time on more; in each round everyone has one step, in an order "
        "drawn anew. Overhead: what a step takes longer than the base's of the same round; its "
        "median and quartiles. Parts of the run: the least and greatest ratio of five. `hooks "
        f"alone` is prepared with `nn.Identity`. Freed memory is {pages}."
    )


_MEMORY_NOTE = (
    "Each row in a process of its own. Saved tensors: what autograd is given to keep; resident "
    "memory: what a forward leaves beyond its output. A step's peak is beyond what lives before "
    f"it, and like all resident memory to {RESOLUTION / 1e6} MB."
)


def _measure_memory(record: Record, arguments: argparse.Namespace) -> bool:
    """Before freed memory is kept, and threads begin; whether it can be."""
    try:
        record.saved += memory.count_saved(arguments.quick)
        for model in arguments.models:
            record.peaks += memory.count_steps(model, arguments.quick)
    except OSError as error:
        record.memory_note = f"Not measured: {error}."
        record.saved, record.peaks = [], []
        return False
    record.memory_note = _MEMORY_NOTE
    return True


def _expected(arguments: argparse.Namespace, has_memory: bool) -> Iterator[Key]:
    """The keys of the rows that there must be."""
    for model in arguments.models:
        for dtype in arguments.dtypes:
            for threads in arguments.threads:
                for contender in contenders(dtype):
                    yield "step", model, dtype, threads, contender
    if not arguments.steps_alone:
        for case in calls.cases():
            for size in calls.SIZES:
                yield "call", case.name, size
    if has_memory:
        for module, granularity in memory.modules():
            yield "saved", module, granularity
        for model in arguments.models:
            for contender in contenders("float32"):
                yield "peak", model, contender


def main() -> None:
    arguments = _arguments()
    warnings.simplefilter("ignore")  # torch.ao's
    gc.freeze()  # what the imports left; to look through it takes longer than some rows
    record = Record(facts("cpu", "bench.qat"), "")
    has_memory = not arguments.steps_alone and _measure_memory(record, arguments)
    record.notes = _notes(keep_memory_warm(_WARM_ELEMENTS))
    for model in arguments.models:
        for dtype in arguments.dtypes:
            for threads in arguments.threads:
                print(f"{model}, {dtype}, {threads} threads", file=sys.stderr)
                record.steps += time_steps(model, dtype, threads, arguments.quick)
    if not arguments.steps_alone:
        record.calls += calls.time_calls(arguments.quick)
    if missing := record.missing(_expected(arguments, has_memory)):
        sys.exit("\n".join(["figures that are missing:", *(str(key) for key in missing)]))
    write(markdown(record), record.to_json(), arguments.output)


if __name__ == "__main__":
    main()
