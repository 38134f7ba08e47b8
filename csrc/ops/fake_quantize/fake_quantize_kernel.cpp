// CPU body of fake_quantize, compiled once per instruction set.
#include "fake_quantize.h"

#include "../../core/bit_mask.h"

namespace pyobserver::PYOBS_ISA {
namespace {

constexpr int64_t kRun = 32;  // shorter runs of one channel are expanded to a scale an element
constexpr int64_t kExpanded = 2048;

template <class T, bool wide>
PYOBS_HD bool quantize_value(T x, T* y, float scale, float inverse_scale, double zero_point,
                             const QuantGrid& grid, bool float_zero_point) {
  const float zero = static_cast<float>(zero_point);
  const auto q = to_grid(widen(x), inverse_scale, zero, float_zero_point);
  bool inside;
  if (wide) {
    store(from_grid_wide(q, scale, zero_point, grid, &inside), y);
  } else {
    from_float(from_grid(q, scale, zero, grid, &inside), y);
  }
  return inside;
}

// Elements of one channel. y may be x: no element waits for another.
template <class T, bool wide, bool masked, bool float_zero_point>
PYOBS_HD void quantize_elements(const T* x, T* y, uint8_t* inside, int64_t n, float scale,
                                double zero_point, const QuantGrid& shared) {
  const QuantGrid grid = shared;  // a copy, which the stores below cannot change
  const float inverse_scale = 1.0f / scale;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const bool in = quantize_value<T, wide>(x[i], &y[i], scale, inverse_scale, zero_point, grid,
                                            float_zero_point);
    if (masked) {
      inside[i] = in;
    }
  }
}

// Runs of channels, from element `position` of the period on.
template <class T, bool wide, bool masked>
void quantize_runs(const T* x, T* y, uint8_t* inside, int64_t n, int64_t position,
                   const ChannelParams& params, const QuantGrid& grid) {
  int64_t channel = params.channels == 1 ? 0 : position / params.inner;
  int64_t left = params.channels == 1 ? n : params.inner - position % params.inner;
  for (int64_t i = 0; i < n;) {
    const int64_t count = left < n - i ? left : n - i;
    const int64_t at = params.base + channel;
    const double zero_point = read_zero_point(params.zero_point, params.type, at);
    if (grid.float_zero_point) {
      quantize_elements<T, wide, masked, true>(x + i, y + i, inside + i, count, params.scale[at],
                                               zero_point, grid);
    } else {
      quantize_elements<T, wide, masked, false>(x + i, y + i, inside + i, count, params.scale[at],
                                                zero_point, grid);
    }
    i += count;
    left = params.inner;
    channel = channel + 1 == params.channels ? 0 : channel + 1;
  }
}

template <class Zero>
struct Expanded {
  float scale[kExpanded], inverse_scale[kExpanded];
  Zero zero_point[kExpanded];
};

template <class Zero, class Saved>
PYOBS_HD void expand_as(const ChannelParams& params, const Saved* zero_points, int64_t position,
                        int64_t n, Expanded<Zero>* out) {
  int64_t channel = position / params.inner;
  int64_t left = params.inner - position % params.inner;
  for (int64_t i = 0; i < n;) {
    const int64_t at = params.base + channel;
    int64_t count = n - i;
    if (params.inner == 1) {
      const int64_t channels = params.channels - channel;
      count = channels < count ? channels : count;
      for (int64_t j = 0; j < count; ++j) {
        out->scale[i + j] = params.scale[at + j];
        out->zero_point[i + j] = static_cast<Zero>(zero_points[at + j]);
      }
      channel += count;
    } else {
      count = left < count ? left : count;
      for (int64_t j = 0; j < count; ++j) {
        out->scale[i + j] = params.scale[at];
        out->zero_point[i + j] = static_cast<Zero>(zero_points[at]);
      }
      left = params.inner;
      ++channel;
    }
    i += count;
    channel = channel == params.channels ? 0 : channel;
  }
  for (int64_t i = 0; i < n; ++i) {
    out->inverse_scale[i] = 1.0f / out->scale[i];
  }
}

// A scale and a zero point for each of n elements, from element `position` of the period on.
template <class Zero>
void expand(const ChannelParams& params, int64_t position, int64_t n, Expanded<Zero>* out) {
  switch (params.type) {
    case ZeroPointType::float32:
      expand_as(params, static_cast<const float*>(params.zero_point), position, n, out);
      break;
    case ZeroPointType::int32:
      expand_as(params, static_cast<const int32_t*>(params.zero_point), position, n, out);
      break;
    default:
      expand_as(params, static_cast<const int64_t*>(params.zero_point), position, n, out);
  }
}

template <class T, bool wide, bool masked, class Zero>
void quantize_expanded(const T* x, T* y, uint8_t* inside, int64_t n, const Expanded<Zero>& params,
                       int64_t from, const QuantGrid& shared) {
  const QuantGrid grid = shared;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = from + i;
    const bool in = quantize_value<T, wide>(x[i], &y[i], params.scale[at], params.inverse_scale[at],
                                            static_cast<double>(params.zero_point[at]), grid,
                                            grid.float_zero_point);
    if (masked) {
      inside[i] = in;
    }
  }
}

template <class T, bool wide>
void forward_runs(const T* x, T* y, uint8_t* mask, int64_t first, int64_t n, int64_t offset,
                  const ChannelParams& params, const QuantGrid& grid) {
  // the divisions that find a channel would take a tenth of a block's time
  const int64_t period = params.channels == 1 ? 0 : params.channels * params.inner;
  const auto position = [&](int64_t i) { return period == 0 ? 0 : (offset + i) % period; };
  if (mask == nullptr) {
    quantize_runs<T, wide, false>(x, y, nullptr, n, position(0), params, grid);
    return;
  }
  for_each_block(n, first, mask, [&](int64_t begin, int64_t count, uint8_t* inside) {
    quantize_runs<T, wide, true>(x + begin, y + begin, inside, count, position(begin), params,
                                 grid);
  });
}

template <class T, bool wide, class Zero>
void forward_expanded(const T* x, T* y, uint8_t* mask, int64_t first, int64_t n, int64_t offset,
                      const ChannelParams& params, const QuantGrid& grid) {
  Expanded<Zero> expanded;
  const int64_t period = params.channels * params.inner;
  const bool once = period + kBlock <= kExpanded;  // a block from anywhere in the period
  if (once) {
    const int64_t needed = n < period ? n : period;
    expand(params, offset % period, needed + (n < kBlock ? n : kBlock), &expanded);
  }
  for_each_block(n, first, mask, [&](int64_t begin, int64_t count, uint8_t* inside) {
    if (!once) {
      expand(params, (offset + begin) % period, count, &expanded);
    }
    const int64_t from = once ? begin % period : 0;
    if (mask != nullptr) {
      quantize_expanded<T, wide, true>(x + begin, y + begin, inside, count, expanded, from, grid);
    } else {
      quantize_expanded<T, wide, false>(x + begin, y + begin, inside, count, expanded, from, grid);
    }
  });
}

template <class T, bool wide>
void forward(const T* x, T* y, uint8_t* mask, int64_t first, int64_t n, int64_t offset,
             const ChannelParams& params, const QuantGrid& grid) {
  if (params.channels == 1 || params.inner >= kRun) {
    forward_runs<T, wide>(x, y, mask, first, n, offset, params, grid);
  } else if (wide) {
    forward_expanded<T, wide, double>(x, y, mask, first, n, offset, params, grid);
  } else {
    forward_expanded<T, wide, float>(x, y, mask, first, n, offset, params, grid);
  }
}

void forward_any(DType dtype, const void* x, void* y, uint8_t* mask, int64_t first, int64_t n,
                 int64_t offset, const ChannelParams& params, const QuantGrid& grid) {
  dispatch(dtype, x, [&](const auto* typed) {
    using T = typename Pointee<decltype(typed)>::type;
    if (grid.wide) {
      forward<T, true>(typed, static_cast<T*>(y), mask, first, n, offset, params, grid);
    } else {
      forward<T, false>(typed, static_cast<T*>(y), mask, first, n, offset, params, grid);
    }
  });
}

template <class T>
void backward(const T* grad, const uint8_t* __restrict mask, T* out, int64_t begin, int64_t end) {
  constexpr int kLanes = 32;
  // a product, as in torch: a clipped NaN stays NaN, a clipped -1 is -0
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    uint32_t bits;
    __builtin_memcpy(&bits, mask + i / 8, sizeof(bits));
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; ++lane) {
      const float kept = (bits & (1u << lane)) != 0 ? 1.0f : 0.0f;
      store(static_cast<double>(widen(grad[i + lane]) * kept), &out[i + lane]);
    }
  }
  for (; i < end; ++i) {
    const float kept = (mask[i / 8] >> (i % 8)) & 1 ? 1.0f : 0.0f;
    store(static_cast<double>(widen(grad[i]) * kept), &out[i]);
  }
}

void backward_any(DType dtype, const void* grad, const uint8_t* mask, void* out, int64_t begin,
                  int64_t end) {
  dispatch(dtype, grad, [&](const auto* typed) {
    using T = typename Pointee<decltype(typed)>::type;
    backward<T>(typed, mask, static_cast<T*>(out), begin, end);
  });
}

}  // namespace

extern const FakeQuantizeTable fake_quantize_table = {forward_any, backward_any};

}  // namespace pyobserver::PYOBS_ISA
