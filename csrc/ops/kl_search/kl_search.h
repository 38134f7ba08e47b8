// kl_search: how many of the first bins of a histogram of |x| to keep, so that their values on
// `levels` levels tell most about all values (NVIDIA's and TensorRT's entropy calibration).
//
// A candidate keeps the bins [0, kept) and lays the levels evenly over them. Reference: the kept
// bins, the last with the counts of all dropped ones. New: each bin with counts has the mean of the
// bins with counts of its level. Wanted: the least divergence of the reference from the new, both
// taken as distributions; of equal ones the greatest range.
//
// With b the counts and T their total, K that of the kept ones, of a level L its counts and m its
// mean, and of the last kept bin e its counts and r those with the dropped ones:
//   T * divergence = sum over levels (sum(b * log b) - L * log m)
//                    + (r * log r - e * log e - (r - e) * log m of the last level) + T * log(K / T)
// and infinite where e is 0 and r is not.
//
// Every backend gives the same bytes: the sums over bins are sums of integers, which have no order,
// the levels are added in theirs, and the logarithm is a formula of + - * / and no library's.
#pragma once

#include "../../core/cpu_isa.h"
#include "../../core/dtype.h"

namespace pyobserver {

constexpr double kEntropyUnit = 0x1p-58;  // the entropies of 2^30 bins are below 2^5
// Divergences so close are equal: the errors of rounding are below, what samples tell is above.
constexpr double kEqualDivergence = 0x1p-44;

// The logarithm of a positive normal number, to a relative 5e-16: by its exponent, and the series
// of the inverse hyperbolic tangent for a mantissa in [sqrt(1/2), sqrt(2)). Of 0 some finite
// number.
PYOBS_HD double kl_log(double x) {
  constexpr double kLn2 = 0.6931471805599453;
  constexpr double kRootOfHalf = 0.7071067811865476;
  constexpr uint64_t kMantissa = (uint64_t{1} << 52) - 1;
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  // 2^52 and the biased exponent, and the mantissa in [1/2, 1)
  const uint64_t shifted_bits = uint64_t{1075} << 52 | bits >> 52;
  const uint64_t mantissa_bits = uint64_t{1022} << 52 | (bits & kMantissa);
  double shifted, mantissa;
  __builtin_memcpy(&shifted, &shifted_bits, sizeof(shifted));
  __builtin_memcpy(&mantissa, &mantissa_bits, sizeof(mantissa));
  const bool small = mantissa < kRootOfHalf;
  const double exponent = shifted - (small ? 0x1p52 + 1023 : 0x1p52 + 1022);
  mantissa = small ? mantissa + mantissa : mantissa;
  const double s = (mantissa - 1.0) / (mantissa + 1.0);
  const double z = s * s;
  double series = 2.0 / 21;
  series = series * z + 2.0 / 19;
  series = series * z + 2.0 / 17;
  series = series * z + 2.0 / 15;
  series = series * z + 2.0 / 13;
  series = series * z + 2.0 / 11;
  series = series * z + 2.0 / 9;
  series = series * z + 2.0 / 7;
  series = series * z + 2.0 / 5;
  series = series * z + 2.0 / 3;
  series = series * z + 2.0;
  return exponent * kLn2 + s * series;
}

// What a level adds, of the bins with counts in it, their counts and the sum of -b * log b. It is
// not negative, and 0 for one bin.
PYOBS_HD double level_divergence(double occupied, double counts, double entropy) {
  const double mean = counts / (occupied > 1.0 ? occupied : 1.0);
  const double lost = -(counts * kl_log(mean)) - entropy;
  return occupied > 1.0 && lost > 0.0 ? lost : 0.0;
}

// Of the bins before one: the counts as integers, the sum of -b * log b in kEntropyUnit, and how
// many have counts.
struct KlSums {
  int64_t counts, entropy, occupied;
};

struct KlScratch {
  KlSums* sums;         // bins + 1
  double* divergences;  // bins
};

struct KlSearchTable {
  // How many bins to keep, of start, start + stride, ... up to all bins.
  int64_t (*search)(const double* counts, int64_t bins, int64_t num_levels, int64_t start,
                    int64_t stride, const KlScratch& scratch);
};

PYOBS_KERNEL_TABLE(KlSearchTable, kl_search_table)

}  // namespace pyobserver
