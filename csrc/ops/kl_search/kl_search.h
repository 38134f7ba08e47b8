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

// What is not positive counts as empty, and the first bin has the counts of the second: zeros of an
// activation, which would outweigh all else, are exact on any grid.
PYOBS_HD double kl_count(const double* counts, int64_t bin) {
  const double count = counts[bin == 0 ? 1 : bin];
  return count > 0.0 ? count : 0.0;
}

PYOBS_HD bool has_kl_counts(double most) { return most > 0.0 && most != __builtin_huge_val(); }

// Counts as integers: in a unit that keeps their sum below 2^62, at least one where there is any
// count. The unit is the product of two, as it may be no float64 itself.
struct KlUnit {
  double scale, rest;
};

PYOBS_HD KlUnit kl_unit(double most, int64_t bins) {
  int exponent = 0;
  __builtin_frexp(most, &exponent);
  int shift = 62 - exponent;
  for (int64_t room = 1; room < bins; room *= 2) {
    --shift;
  }
  const int half = shift >> 1;
  return {__builtin_ldexp(1.0, half), __builtin_ldexp(1.0, shift - half)};
}

PYOBS_HD int64_t kl_integer(double count, const KlUnit& unit) {
  const auto scaled = static_cast<int64_t>(__builtin_rint(count * unit.scale * unit.rest));
  const int64_t occupied = count > 0.0 ? 1 : 0;
  return scaled > occupied ? scaled : occupied;
}

// A power of two that makes the total a number in [1/2, 1).
PYOBS_HD double kl_share(int64_t total) {
  double share = 1.0;
  for (; total > 0; total /= 2) {
    share /= 2;
  }
  return share;
}

PYOBS_HD int64_t kl_entropy(int64_t count, double share) {
  const double counts = static_cast<double>(count) * share;
  return static_cast<int64_t>(__builtin_rint(counts * -kl_log(counts) * (1.0 / kEntropyUnit)));
}

// What lies between two bins, in float64.
struct KlLevel {
  double occupied, counts, entropy;
};

PYOBS_HD KlLevel kl_level(const KlSums& begin, const KlSums& end, double share) {
  return {static_cast<double>(end.occupied - begin.occupied),
          static_cast<double>(end.counts - begin.counts) * share,
          static_cast<double>(end.entropy - begin.entropy) * kEntropyUnit};
}

// The levels of a candidate: with more than bins each bin has its own all the same.
PYOBS_HD int32_t kl_levels(int64_t kept, int64_t num_levels) {
  return static_cast<int32_t>(num_levels < kept ? num_levels : kept);
}

// Where level `index` begins, of those `step` bins wide: numpy.linspace(0, kept, levels + 1),
// rounded up.
PYOBS_HD int32_t kl_edge(int32_t index, double step) {
  return static_cast<int32_t>(__builtin_ceil(static_cast<double>(index) * step));
}

PYOBS_HD bool has_empty_end(const KlSums* sums, int64_t bins, int64_t kept) {
  return sums[bins].counts > sums[kept].counts && sums[kept].counts == sums[kept - 1].counts;
}

// The divergence of a candidate, times the total, of what its levels add and the last of them; for
// one whose last bin is not empty.
PYOBS_HD double kl_divergence(const KlSums* sums, int64_t bins, int64_t kept, double within,
                              const KlLevel& last, double share) {
  const int64_t total = sums[bins].counts;
  const int64_t dropped = total - sums[kept].counts;
  if (dropped == 0) {
    return within;
  }
  const int64_t end = sums[kept].counts - sums[kept - 1].counts;
  const double moved = static_cast<double>(dropped) * share;
  const double raised = static_cast<double>(end + dropped) * share;
  const double entropy =
      static_cast<double>(sums[kept].entropy - sums[kept - 1].entropy) * kEntropyUnit;
  const double at_end =
      raised * kl_log(raised) + entropy - moved * kl_log(last.counts / last.occupied);
  const double whole = static_cast<double>(total) * share;
  return within + at_end + whole * kl_log(static_cast<double>(sums[kept].counts) * share / whole);
}

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
