"""The ops, as functions; each is also ``torch.ops.pyobserver.<name>``."""

from .choose_qparams import choose_qparams
from .fake_quantize import fake_quantize
from .histogram import histogram, histogram_combine
from .minmax import minmax
from .range_search import range_search

__all__ = [
    "choose_qparams",
    "fake_quantize",
    "histogram",
    "histogram_combine",
    "minmax",
    "range_search",
]
