// CPU body of range_search, compiled once per instruction set.
#include "range_search.h"

#include "../../core/simd.h"

namespace pyobserver::PYOBS_ISA {
namespace {

constexpr double kStep = 1e-5;
constexpr int32_t kBlock = kSums;
constexpr int32_t kChunk = 128;

// The bins of all blocks of eight that hold counts, and their densities. The others add zeros.
struct Occupied {
  int32_t size;
  const int32_t* bins;
  const float* density;
};

// Fills the cumulative counts as well.
Occupied find_occupied(const double* counts, int32_t bins, float bin_width,
                       const SearchScratch& scratch) {
  int32_t size = 0;
  double running = 0.0;
  const auto add_block = [&](int32_t first_bin, const double* of_block) {
    float* density = scratch.density + size;
    int32_t* occupied = scratch.occupied + size;
    float block[kBlock];
    uint32_t any = 0;
    for (int32_t lane = 0; lane < kBlock; ++lane) {
      block[lane] = static_cast<float>(of_block[lane]);
    }
    for (int32_t lane = 0; lane < kBlock; ++lane) {
      density[lane] = block[lane] / bin_width;
      occupied[lane] = first_bin + lane;
      any |= float_to_bits(density[lane]);
    }
    for (int32_t lane = 0; lane < kBlock; ++lane) {
      running += static_cast<double>(block[lane]);
      scratch.cumulative[first_bin + lane] = static_cast<float>(running);
    }
    size += any != 0 ? kBlock : 0;
  };
  int32_t bin = 0;
  for (; bin + kBlock <= bins; bin += kBlock) {
    add_block(bin, counts + bin);
  }
  for (; bin < bins; ++bin) {
    const double alone[kBlock] = {counts[bin]};  // added to the first of the eight sums
    add_block(bin, alone);
  }
  return {size, scratch.occupied, scratch.density};
}

template <class Levels>
void bin_errors(const int32_t* bins, const float* density, int32_t size, const ErrorParams& params,
                float* errors) {
  for (int32_t i = 0; i < size; ++i) {
    errors[i] = bin_error<Levels>(bins[i], density[i], params);
  }
}

double sum_errors(const Occupied& occupied, BinSpan span, int64_t num_levels,
                  const ErrorParams& params) {
  double sums[kSums] = {};
  float errors[kChunk];
  for (int32_t begin = 0; begin < occupied.size; begin += kChunk) {
    const int32_t size = occupied.size - begin < kChunk ? occupied.size - begin : kChunk;
    const int32_t* bins = occupied.bins + begin;
    const float* density = occupied.density + begin;
    if (num_levels > kFewLevels) {
      bin_errors<Many>(bins, density, size, params, errors);
    } else if (bins[size - 1] < span.first) {
      bin_errors<FewBefore>(bins, density, size, params, errors);
    } else if (bins[0] > span.last) {
      bin_errors<FewAfter>(bins, density, size, params, errors);
    } else {
      bin_errors<Few>(bins, density, size, params, errors);
    }
    for (int32_t i = 0; i < size; i += kBlock) {
      for (int32_t lane = 0; lane < kBlock; ++lane) {
        sums[lane] += static_cast<double>(errors[i + lane]);
      }
    }
  }
  return total_of(sums);
}

double total_error(const Occupied& occupied, double bin_width, BinSpan span, int64_t num_levels) {
  const double level_width =
      bin_width * (span.last - span.first + 1) / static_cast<double>(num_levels);
  ErrorParams params;
  params.bin_width = static_cast<float>(bin_width);
  params.level_width = static_cast<float>(level_width);
  params.half_level = static_cast<float>(level_width / 2);
  params.start = span.first;
  params.top_level = static_cast<float>(num_levels - 1);
  params.per_level = (cube(params.half_level) - cube(-params.half_level)) / 3.0f;
  params.per_width = 1.0f / params.level_width;
  params.inside_top = (params.top_level + 0.5f) * params.level_width;
  return sum_errors(occupied, span, num_levels, params);
}

// Where beta gets to by steps of its own until the kept bins may change: as far as beta * total
// is not below `reached`, within one power of two.
//
// There, from 1 down to 2^-10, all values are multiples of one unit, and none is at a tie: kStep's
// last bit is at 2^-69, which is half a unit only below 2^-15. So each step takes off the same
// multiple of the unit, and a multiple of that is exact while the difference is above the border.
double skip_idle_steps(double beta, double total, float reached) {
  if (beta <= 0x1p-10) {
    return beta;
  }
  double border = 0.5;
  while (border >= beta) {
    border /= 2;
  }
  const double step = beta - (beta - kStep);
  double skipped = 0.0;
  for (double more = 0x1p16; more >= 1.0; more /= 2) {
    const double next = beta - (skipped + more) * step;
    if (next > border && !(reached > static_cast<float>(next * total))) {
      skipped += more;
    }
  }
  return beta - skipped * step;
}

BinSpan greedy_l2(const double* counts, int32_t bins, double width, double total,
                  int64_t num_levels, const SearchScratch& scratch) {
  // scaling by a power of two changes no decision, and keeps the cubes inside float32
  int exponent = 0;
  const double bin_width = __builtin_frexp(width, &exponent);
  const Occupied occupied = find_occupied(counts, bins, static_cast<float>(bin_width), scratch);
  const float* cumulative = scratch.cumulative;
  BinSpan span = {0, bins - 1};
  int32_t left = 0, right = bins - 1;
  double alpha = 0.0, beta = 1.0;
  double best = __builtin_huge_val();
  while (alpha < beta) {
    const double next_alpha = alpha + kStep;
    const double next_beta = beta - kStep;
    // comparisons with the quantiles are float32's, as in torch
    const float lower = static_cast<float>(next_alpha * total);
    const float upper = static_cast<float>(next_beta * total);
    // both move inward only, so they go on from where they were
    left = left > span.last ? span.last : left;
    right = right < span.first ? span.first : right;
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
      if (span.first == span.last) {
        break;
      }
      // alpha stays until beta has moved the last bin; when it passes alpha first, all ends anyway
      beta = skip_idle_steps(beta, total, cumulative[span.last]);
      continue;
    }
    const double error = total_error(occupied, bin_width, next, num_levels);
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
