// CPU body of histogram, compiled once per instruction set.
#include "histogram.h"

#include "../../core/simd.h"

namespace pyobserver::PYOBS_ISA {
namespace {

constexpr int kBlock = 256;  // indices are computed in vectors, then counted one by one

template <class T>
bool bin(const T* x, int64_t n, const BinGrid& shared, float low, float high, int64_t spread,
         uint32_t* counts) {
  const BinGrid grid = shared;  // a copy, which the stores below cannot change
  int32_t index[kBlock];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int count = n - start < kBlock ? static_cast<int>(n - start) : kBlock;
    int32_t outside = 0;
    if (grid.wide || grid.unsplit) {
      for (int i = 0; i < count; ++i) {
        const float value = to_float(x[start + i]);
        const bool finite = is_finite(value);
        const bool beyond = (value < low) | (value > high);
        outside |= finite & beyond;
        const int32_t found = bin_index(finite & !beyond ? value : low, grid);
        index[i] = finite ? found : grid.bins;
      }
    } else {
      for (int i = 0; i < count; ++i) {
        const float value = to_float(x[start + i]);
        const bool finite = is_finite(value);
        const bool beyond = (value < low) | (value > high);
        outside |= finite & beyond;
        // a stand-in keeps the conversion to an integer defined
        const int32_t found = narrow_bin_index(finite & !beyond ? value : grid.left, grid);
        index[i] = finite ? found : grid.bins;
      }
    }
    if (outside != 0) {
      return false;
    }
    int i = 0;
    for (; i + 2 <= count; i += 2) {
      ++counts[index[i]];
      ++counts[spread + index[i + 1]];
    }
    if (i < count) {
      ++counts[index[i]];
    }
  }
  return true;
}

bool bin_any(DType dtype, const void* x, int64_t n, const BinGrid& grid, float low, float high,
             int64_t spread, uint32_t* counts) {
  return dispatch(
      dtype, x, [&](const auto* typed) { return bin(typed, n, grid, low, high, spread, counts); });
}

void add(double* counts, const double* carried, const uint32_t* added, int64_t rows, int64_t stride,
         int32_t bins, double repeat, bool narrow) {
  constexpr int32_t kBins = 64;
  for (int32_t start = 0; start < bins; start += kBins) {
    const int32_t count = bins - start < kBins ? bins - start : kBins;
    double sums[kBins] = {};
    for (int64_t row = 0; row < rows; ++row) {
      for (int32_t i = 0; i < count; ++i) {
        sums[i] += static_cast<double>(added[row * stride + start + i]);
      }
    }
    for (int32_t i = 0; i < count; ++i) {
      const double sum = (carried == nullptr ? 0.0 : carried[start + i]) + repeat * sums[i];
      sums[i] = narrow ? static_cast<double>(static_cast<float>(sum)) : sum;
    }
    __builtin_memcpy(counts + start, sums, count * sizeof(double));
  }
}

double sum(const double* counts, int32_t bins) {
  double sums[kSums] = {};
  int32_t i = 0;
  for (; i + kSums <= bins; i += kSums) {
    for (int lane = 0; lane < kSums; ++lane) {
      sums[lane] += counts[i + lane];
    }
  }
  for (; i < bins; ++i) {
    sums[0] += counts[i];
  }
  return total_of(sums);
}

}  // namespace

extern const HistogramTable histogram_table = {bin_any, add, sum};

}  // namespace pyobserver::PYOBS_ISA
