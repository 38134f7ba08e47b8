"""The ops, as functions; each is also ``torch.ops.pyobserver.<name>``."""

from .choose_qparams import choose_qparams
from .fake_quantize import fake_quantize
from .histogram import histogram, histogram_combine
from .lp_search import lp_error, lp_search
from .minmax import minmax
from .observe_fake_quantize import observe_fake_quantize
from .range_search import range_search

__all__ = [
    "choose_qparams",
    "fake_quantize",
    "histogram",
    "histogram_combine",
    "lp_error",
    "lp_search",
    "minmax",
    "observe_fake_quantize",
    "range_search",
]
