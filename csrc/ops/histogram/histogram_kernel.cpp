// CPU body of histogram, compiled once per instruction set.
#include "histogram.h"

namespace pyobserver::PYOBS_ISA {
namespace {

constexpr int kBlock = 256;  // indices are computed in vectors, then counted one by one

template <class T>
void bin(const T* x, int64_t n, const BinGrid& shared, int64_t* counts) {
  const BinGrid grid = shared;  // a copy, which the stores below cannot change
  int32_t index[kBlock];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int count = n - start < kBlock ? static_cast<int>(n - start) : kBlock;
    if (grid.wide || grid.unsplit) {
      for (int i = 0; i < count; ++i) {
        const float value = to_float(x[start + i]);
        index[i] = is_finite(value) ? bin_index(value, grid) : grid.bins;
      }
    } else {
      for (int i = 0; i < count; ++i) {
        const float value = to_float(x[start + i]);
        const bool finite = is_finite(value);
        // a finite stand-in keeps the conversion to an integer defined
        const int32_t bin = narrow_bin_index(finite ? value : grid.left, grid);
        index[i] = finite ? bin : grid.bins;
      }
    }
    for (int i = 0; i < count; ++i) {
      ++counts[index[i]];
    }
  }
}

void bin_any(DType dtype, const void* x, int64_t n, const BinGrid& grid, int64_t* counts) {
  dispatch(dtype, x, [&](const auto* typed) {
    using T = typename Pointee<decltype(typed)>::type;
    bin<T>(typed, n, grid, counts);
  });
}

}  // namespace

extern const HistogramTable histogram_table = {bin_any};

}  // namespace pyobserver::PYOBS_ISA
