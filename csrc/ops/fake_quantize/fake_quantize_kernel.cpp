// CPU body of fake_quantize, compiled once per instruction set.
#include "fake_quantize.h"

namespace pyobserver::PYOBS_ISA {
namespace {

constexpr int kBlock = 512;   // elements whose inside flags are gathered before they are packed
constexpr int64_t kRun = 32;  // shorter runs of one channel are expanded to a scale an element

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

template <class T, bool wide>
void quantize_run(const T* __restrict x, T* __restrict y, uint8_t* __restrict inside, int64_t n,
                  float scale, float inverse_scale, double zero_point, const QuantGrid& shared) {
  const QuantGrid grid = shared;  // a copy, which the stores below cannot change
  if (grid.float_zero_point) {
    for (int64_t i = 0; i < n; ++i) {
      inside[i] =
          quantize_value<T, wide>(x[i], &y[i], scale, inverse_scale, zero_point, grid, true);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      inside[i] =
          quantize_value<T, wide>(x[i], &y[i], scale, inverse_scale, zero_point, grid, false);
    }
  }
}

template <class T, bool wide>
void quantize_block(const T* __restrict x, T* __restrict y, uint8_t* __restrict inside,
                    int64_t begin, int n, const ChannelParams& params, const QuantGrid& shared) {
  const QuantGrid grid = shared;
  int64_t channel = begin / params.inner % params.channels;
  int64_t within = begin % params.inner;
  if (params.inner >= kRun) {
    for (int i = 0; i < n;) {
      const int64_t left = params.inner - within;
      const int run = left < n - i ? static_cast<int>(left) : n - i;
      quantize_run<T, wide>(x + i, y + i, inside + i, run, params.scale[channel],
                            params.inverse_scale[channel], params.zero_point[channel], grid);
      i += run;
      within = 0;
      channel = channel + 1 == params.channels ? 0 : channel + 1;
    }
    return;
  }
  float scale[kBlock], inverse_scale[kBlock];
  double zero_point[kBlock];
  for (int i = 0; i < n; ++i) {
    scale[i] = params.scale[channel];
    inverse_scale[i] = params.inverse_scale[channel];
    zero_point[i] = params.zero_point[channel];
    if (++within == params.inner) {
      within = 0;
      channel = channel + 1 == params.channels ? 0 : channel + 1;
    }
  }
  for (int i = 0; i < n; ++i) {
    inside[i] = quantize_value<T, wide>(x[i], &y[i], scale[i], inverse_scale[i], zero_point[i],
                                        grid, grid.float_zero_point);
  }
}

template <class T, bool wide>
void forward(const T* x, T* y, uint8_t* mask, int64_t begin, int64_t end,
             const ChannelParams& params, const QuantGrid& grid) {
  uint8_t inside[kBlock];
  for (int64_t start = begin; start < end; start += kBlock) {
    const int n = end - start < kBlock ? static_cast<int>(end - start) : kBlock;
    if (params.channels == 1) {
      quantize_run<T, wide>(x + start, y + start, inside, n, params.scale[0],
                            params.inverse_scale[0], params.zero_point[0], grid);
    } else {
      quantize_block<T, wide>(x + start, y + start, inside, start, n, params, grid);
    }
    if (mask != nullptr) {
      for (int i = n; i % 8 != 0; ++i) {
        inside[i] = 0;
      }
      for (int i = 0; i < n; i += 8) {
        uint32_t byte = 0;
        for (int bit = 0; bit < 8; ++bit) {
          byte |= static_cast<uint32_t>(inside[i + bit]) << bit;
        }
        mask[(start + i) / 8] = static_cast<uint8_t>(byte);
      }
    }
  }
}

template <class T>
void backward(const T* __restrict grad, const uint8_t* __restrict mask, T* __restrict out,
              int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + 8 <= end; i += 8) {
    const uint32_t byte = mask[i / 8];
    for (int bit = 0; bit < 8; ++bit) {
      // a product, as in torch: a clipped NaN stays NaN, a clipped -1 is -0
      store(static_cast<double>(widen(grad[i + bit]) * static_cast<float>((byte >> bit) & 1u)),
            &out[i + bit]);
    }
  }
  for (; i < end; ++i) {
    store(static_cast<double>(widen(grad[i]) * static_cast<float>((mask[i / 8] >> (i % 8)) & 1)),
          &out[i]);
  }
}

void forward_any(DType dtype, const void* x, void* y, uint8_t* mask, int64_t begin, int64_t end,
                 const ChannelParams& params, const QuantGrid& grid) {
  dispatch(dtype, x, [&](const auto* typed) {
    using T = typename Pointee<decltype(typed)>::type;
    if (grid.wide) {
      forward<T, true>(typed, static_cast<T*>(y), mask, begin, end, params, grid);
    } else {
      forward<T, false>(typed, static_cast<T*>(y), mask, begin, end, params, grid);
    }
  });
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
