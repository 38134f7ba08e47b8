// CPU body of tensor_quant and fake_tensor_quant, compiled once per instruction set.
#include "tensor_quant.h"

#include "../../core/bit_mask.h"

namespace pyobserver::PYOBS_ISA {
namespace {

constexpr int64_t kRun = 32;  // shorter runs of one amax are expanded to a scale an element
constexpr int64_t kExpanded = 2048;

template <class T>
using ComputeOf = decltype(widen(T{}));

template <bool fake, bool masked, class T, class Compute>
PYOBS_HD void quantize_value(T x, T* y, uint8_t* inside, const AmaxScale<Compute>& scale,
                             const AmaxGrid& grid) {
  const Compute value = widen(x);
  const Compute q = to_amax_grid(value, scale.multiplier, grid);
  store(fake ? q / scale.divisor : q, y);
  if (masked) {
    *inside = is_within(value, scale.amax);
  }
}

// Elements of one amax.
template <class T, bool fake, bool masked>
PYOBS_HD void quantize_elements(const T* x, T* y, uint8_t* inside, int64_t n,
                                const AmaxScale<ComputeOf<T>>& scale, const AmaxGrid& shared) {
  const AmaxGrid grid = shared;  // a copy, which the stores below cannot change
  const AmaxScale<ComputeOf<T>> own = scale;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    quantize_value<fake, masked>(x[i], &y[i], &inside[i], own, grid);
  }
}

// Runs, from element `position` of the period on.
template <class T, bool fake, bool masked>
void quantize_runs(const T* x, T* y, uint8_t* inside, int64_t n, int64_t position,
                   const AmaxParams& params, const AmaxGrid& grid) {
  int64_t channel = position / params.inner;
  int64_t left = params.inner - position % params.inner;
  for (int64_t i = 0; i < n;) {
    const int64_t count = left < n - i ? left : n - i;
    const auto scale = dispatch(params.type, params.amax, [&](const auto* amax) {
      return read_amax<ComputeOf<T>>(amax[params.base + channel], grid.max_bound);
    });
    quantize_elements<T, fake, masked>(x + i, y + i, inside + i, count, scale, grid);
    i += count;
    left = params.inner;
    channel = channel + 1 == params.channels ? 0 : channel + 1;
  }
}

template <class Compute>
struct Expanded {
  Compute amax[kExpanded], multiplier[kExpanded], divisor[kExpanded];
};

// A scale of its own for each of n elements from `first` on.
template <class Compute, class Amax>
PYOBS_HD void expand_each(const Amax* __restrict amax, int64_t n, const AmaxGrid& shared,
                          int64_t first, Expanded<Compute>* __restrict out) {
  const AmaxGrid grid = shared;
  for (int64_t i = 0; i < n; ++i) {
    const auto scale = read_amax<Compute>(amax[i], grid.max_bound);
    out->amax[first + i] = scale.amax;
    out->multiplier[first + i] = scale.multiplier;
    out->divisor[first + i] = scale.divisor;
  }
}

template <class Compute>
PYOBS_HD void expand_one(const AmaxScale<Compute>& scale, int64_t n, int64_t first,
                         Expanded<Compute>* out) {
  for (int64_t i = first; i < first + n; ++i) {
    out->amax[i] = scale.amax;
    out->multiplier[i] = scale.multiplier;
    out->divisor[i] = scale.divisor;
  }
}

template <class Compute, class Amax>
PYOBS_HD void expand_as(const Amax* amax, const AmaxParams& params, const AmaxGrid& grid,
                        int64_t position, int64_t n, Expanded<Compute>* out) {
  int64_t channel = position / params.inner;
  int64_t left = params.inner - position % params.inner;
  for (int64_t i = 0; i < n;) {
    const Amax* from = amax + params.base + channel;
    int64_t count = n - i;
    if (params.inner == 1) {
      const int64_t channels = params.channels - channel;
      count = channels < count ? channels : count;
      expand_each(from, count, grid, i, out);
      channel += count;
    } else {
      count = left < count ? left : count;
      expand_one(read_amax<Compute>(*from, grid.max_bound), count, i, out);
      left = params.inner;
      ++channel;
    }
    i += count;
    channel = channel == params.channels ? 0 : channel;
  }
}

// A scale for each of n elements, from element `position` of the period on.
template <class Compute>
void expand(const AmaxParams& params, const AmaxGrid& grid, int64_t position, int64_t n,
            Expanded<Compute>* out) {
  dispatch(params.type, params.amax,
           [&](const auto* amax) { expand_as(amax, params, grid, position, n, out); });
}

template <class T, bool fake, bool masked>
void quantize_expanded(const T* x, T* y, uint8_t* inside, int64_t n,
                       const Expanded<ComputeOf<T>>& scales, int64_t from, const AmaxGrid& shared) {
  const AmaxGrid grid = shared;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = from + i;
    const AmaxScale<ComputeOf<T>> scale = {scales.amax[at], scales.multiplier[at],
                                           scales.divisor[at]};
    quantize_value<fake, masked>(x[i], &y[i], &inside[i], scale, grid);
  }
}

template <class T>
bool any_negative(const T* x, int64_t n) {
  int found = 0;
  for (int64_t i = 0; i < n; ++i) {
    found |= widen(x[i]) < 0;
  }
  return found != 0;
}

template <class T, bool fake, bool masked>
bool forward(const T* x, T* y, uint8_t* mask, int64_t first, int64_t n, int64_t offset,
             const AmaxParams& params, const AmaxGrid& grid) {
  const int64_t period = params.channels * params.inner;
  const bool runs = params.channels == 1 || params.inner >= kRun;
  const bool once = !runs && period + kBlock <= kExpanded;  // a block from anywhere in the period
  Expanded<ComputeOf<T>> scales;
  if (once) {
    const int64_t needed = n < period ? n : period;
    expand(params, grid, offset % period, needed + (n < kBlock ? n : kBlock), &scales);
  }
  bool negative = false;
  for_each_block(n, first, mask, [&](int64_t begin, int64_t count, uint8_t* inside) {
    const int64_t position = (offset + begin) % period;
    if (grid.min_bound == 0.0f) {
      negative |= any_negative(x + begin, count);
    }
    if (runs) {
      quantize_runs<T, fake, masked>(x + begin, y + begin, inside, count, position, params, grid);
      return;
    }
    if (!once) {
      expand(params, grid, position, count, &scales);
    }
    quantize_expanded<T, fake, masked>(x + begin, y + begin, inside, count, scales,
                                       once ? begin % period : 0, grid);
  });
  return negative;
}

template <class T, bool fake>
bool forward_masked(const T* x, T* y, uint8_t* mask, int64_t first, int64_t n, int64_t offset,
                    const AmaxParams& params, const AmaxGrid& grid) {
  return mask != nullptr ? forward<T, fake, true>(x, y, mask, first, n, offset, params, grid)
                         : forward<T, fake, false>(x, y, mask, first, n, offset, params, grid);
}

bool forward_any(DType dtype, const void* x, void* y, uint8_t* mask, int64_t first, int64_t n,
                 int64_t offset, const AmaxParams& params, const AmaxGrid& grid, bool fake) {
  return dispatch(dtype, x, [&](const auto* typed) {
    using T = typename Pointee<decltype(typed)>::type;
    auto* out = static_cast<T*>(y);
    return fake ? forward_masked<T, true>(typed, out, mask, first, n, offset, params, grid)
                : forward_masked<T, false>(typed, out, mask, first, n, offset, params, grid);
  });
}

// Of the bits of the gradients: those of a clipped value become 0, whatever they were.
template <class Bits>
void backward(const Bits* grad, const uint8_t* __restrict mask, Bits* out, int64_t begin,
              int64_t end) {
  constexpr int kLanes = 32;
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    uint32_t bits;
    __builtin_memcpy(&bits, mask + i / 8, sizeof(bits));
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; ++lane) {
      out[i + lane] = (bits & (1u << lane)) != 0 ? grad[i + lane] : Bits{0};
    }
  }
  for (; i < end; ++i) {
    out[i] = (mask[i / 8] >> (i % 8)) & 1 ? grad[i] : Bits{0};
  }
}

void backward_any(DType dtype, const void* grad, const uint8_t* mask, void* out, int64_t begin,
                  int64_t end) {
  switch (element_size(dtype)) {
    case 8:
      backward(static_cast<const uint64_t*>(grad), mask, static_cast<uint64_t*>(out), begin, end);
      break;
    case 4:
      backward(static_cast<const uint32_t*>(grad), mask, static_cast<uint32_t*>(out), begin, end);
      break;
    default:
      backward(static_cast<const uint16_t*>(grad), mask, static_cast<uint16_t*>(out), begin, end);
  }
}

}  // namespace

extern const TensorQuantTable tensor_quant_table = {forward_any, backward_any};

}  // namespace pyobserver::PYOBS_ISA
