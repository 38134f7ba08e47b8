// CPU body of learnable_clip and of its backward, compiled once per instruction set.
#include "learnable_clip.h"

#include "../../core/bit_mask.h"

namespace pyobserver::PYOBS_ISA {
namespace {

template <bool quantized, bool masked, class T>
PYOBS_HD bool clip_elements(const T* x, T* y, uint8_t* below, uint8_t* above, int64_t n,
                            const ClipArgs& args) {
  const auto bounds = clip_bounds<T>(args.low, args.high, args.grid);
  const AmaxGrid grid = args.grid.grid;
  uint8_t negative = 0;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const auto value = widen(x[i]);
    const auto clipped = clip(value, bounds);
    store(static_cast<double>(clip_result<quantized>(clipped, bounds, grid)), &y[i]);
    if (masked) {
      below[i] = value <= bounds.low;
      above[i] = value >= bounds.high;
    }
    if (quantized) {
      negative = static_cast<uint8_t>(negative | (clipped < 0));
    }
  }
  return negative != 0;
}

template <class T, bool quantized>
bool forward(const T* x, T* y, const ClipMask& mask, int64_t first, int64_t n,
             const ClipArgs& args) {
  if (mask.below == nullptr) {
    return clip_elements<quantized, false>(x, y, nullptr, nullptr, n, args);
  }
  bool negative = false;
  for_each_block(n, first, mask.below, [&](int64_t begin, int64_t count, uint8_t* below) {
    uint8_t above[kBlock];
    negative |= clip_elements<quantized, true>(x + begin, y + begin, below, above, count, args);
    const int64_t bit = first + begin;
    pack_bits(above, count, static_cast<int>(bit % 8), mask.above + bit / 8);
  });
  return negative;
}

bool forward_any(DType dtype, const void* x, void* y, const ClipMask& mask, int64_t first,
                 int64_t n, const ClipArgs& args) {
  return dispatch(dtype, x, [&](const auto* typed) {
    using T = typename Pointee<decltype(typed)>::type;
    auto* out = static_cast<T*>(y);
    return args.grid.quantized ? forward<T, true>(typed, out, mask, first, n, args)
                               : forward<T, false>(typed, out, mask, first, n, args);
  });
}

template <class T>
PYOBS_HD void add_marked(const T* grad, const uint8_t* marked, int64_t count, double* lanes) {
  for (int64_t j = 0; j < count; ++j) {
    const auto value = static_cast<double>(widen(grad[j]));
    lanes[j] += marked[j] != 0 ? value : 0.0;
  }
}

PYOBS_HD float zero_if(bool marked, float value) { return marked ? 0.0f : value; }
PYOBS_HD double zero_if(bool marked, double value) { return marked ? 0.0 : value; }
template <class T>
PYOBS_HD T zero_if(bool marked, T value) {
  return {marked ? uint16_t{0} : value.bits};
}

template <class T>
PYOBS_HD void pass_unmarked(const T* __restrict grad, const uint8_t* below, const uint8_t* above,
                            int64_t count, T* __restrict out) {
#pragma GCC ivdep
  for (int64_t j = 0; j < count; ++j) {
    out[j] = zero_if((below[j] | above[j]) != 0, grad[j]);
  }
}

template <class T>
void backward(const ClipBackward& args, int64_t begin, int64_t end) {
  const T* grad = static_cast<const T*>(args.grad);
  T* out = static_cast<T*>(args.out);
  Lanes lanes;
  uint8_t below[kLanes], above[kLanes];
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * args.chunk;
    const int64_t last = first + args.chunk < args.n ? first + args.chunk : args.n;
    const int64_t used = lanes_of(last - first);
    clear(&lanes, used);
    for (int64_t row = first; row < last; row += kLanes) {
      const int64_t count = kLanes < last - row ? kLanes : last - row;
      unpack_bits(args.below + row / 8, count, below);
      unpack_bits(args.above + row / 8, count, above);
      pass_unmarked(grad + row, below, above, count, out + row);
      add_marked(grad + row, below, count, lanes.first);
      add_marked(grad + row, above, count, lanes.second);
    }
    args.sums[chunk] = fold(&lanes, used);
  }
}

void backward_any(DType dtype, const ClipBackward& args, int64_t begin, int64_t end) {
  dispatch(dtype, args.grad, [&](const auto* typed) {
    backward<typename Pointee<decltype(typed)>::type>(args, begin, end);
  });
}

PairSums finish_any(const PairSums* sums, int64_t chunks) { return total_of_chunks(sums, chunks); }

}  // namespace

extern const LearnableClipTable learnable_clip_table = {forward_any, backward_any, finish_any};

}  // namespace pyobserver::PYOBS_ISA
