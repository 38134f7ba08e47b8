// CPU body of range_search, compiled once per instruction set.
#include "range_search.h"

namespace pyobserver::PYOBS_ISA {
namespace {

constexpr double kStep = 1e-5;

double total_error(const float* density, int32_t bins, double bin_width, BinSpan span,
                   int64_t num_levels) {
  const double level_width =
      bin_width * (span.last - span.first + 1) / static_cast<double>(num_levels);
  ErrorParams params;
  params.bin_width = static_cast<float>(bin_width);
  params.level_width = static_cast<float>(level_width);
  params.half_level = static_cast<float>(level_width / 2);
  params.start = span.first;
  params.top_level = static_cast<float>(num_levels - 1);
  // eight sums in a fixed order, the same for every instruction set
  double sums[8] = {};
  int32_t bin = 0;
  for (; bin + 8 <= bins; bin += 8) {
    for (int lane = 0; lane < 8; ++lane) {
      sums[lane] += static_cast<double>(bin_error(bin + lane, density[bin + lane], params));
    }
  }
  for (; bin < bins; ++bin) {
    sums[0] += static_cast<double>(bin_error(bin, density[bin], params));
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

BinSpan greedy_l2(const double* counts, int32_t bins, double width, double total,
                  int64_t num_levels, float* scratch) {
  float* density = scratch;
  float* cumulative = scratch + bins;
  // scaling by a power of two changes no decision, and keeps the cubes inside float32
  int exponent = 0;
  const double bin_width = __builtin_frexp(width, &exponent);
  double running = 0.0;
  for (int32_t i = 0; i < bins; ++i) {
    density[i] = static_cast<float>(counts[i]) / static_cast<float>(bin_width);
    running += static_cast<double>(static_cast<float>(counts[i]));
    cumulative[i] = static_cast<float>(running);
  }
  BinSpan span = {0, bins - 1};
  double alpha = 0.0, beta = 1.0;
  double best = __builtin_huge_val();
  while (alpha < beta) {
    const double next_alpha = alpha + kStep;
    const double next_beta = beta - kStep;
    // comparisons with the quantiles are float32's, as in torch
    const float lower = static_cast<float>(next_alpha * total);
    const float upper = static_cast<float>(next_beta * total);
    int32_t left = span.first, right = span.last;
    while (left < span.last && cumulative[left] < lower) {
      ++left;
    }
    while (right > span.first && cumulative[right] > upper) {
      --right;
    }
    BinSpan next = span;
    if (left - span.first > span.last - right) {
      next.first = left;
      alpha = next_alpha;
    } else {
      next.last = right;
      beta = next_beta;
    }
    if (next.first == span.first && next.last == span.last) {
      continue;
    }
    const double error = total_error(density, bins, bin_width, next, num_levels);
    if (error > best) {
      break;
    }
    best = error;
    span = next;
  }
  return span;
}

}  // namespace

extern const RangeSearchTable range_search_table = {greedy_l2};

}  // namespace pyobserver::PYOBS_ISA
