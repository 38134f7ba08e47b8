"""The ops, as functions; each is also ``torch.ops.pyobserver.<name>``."""

from .choose_qparams import choose_qparams
from .fake_quantize import fake_quantize
from .histogram import histogram, histogram_combine
from .kl_search import kl_search
from .learnable_clip import learnable_clip
from .learnable_fake_quantize import learnable_fake_quantize
from .log_histogram import log_columns, log_edges, log_histogram, mantissa_bits_of
from .lp_search import lp_error, lp_search
from .minmax import minmax
from .observe_fake_quantize import observe_fake_quantize
from .range_search import range_search
from .tensor_quant import fake_tensor_quant, tensor_quant

__all__ = [
    "choose_qparams",
    "fake_quantize",
    "fake_tensor_quant",
    "histogram",
    "histogram_combine",
    "kl_search",
    "learnable_clip",
    "learnable_fake_quantize",
    "log_columns",
    "log_edges",
    "log_histogram",
    "lp_error",
    "lp_search",
    "mantissa_bits_of",
    "minmax",
    "observe_fake_quantize",
    "range_search",
    "tensor_quant",
]
