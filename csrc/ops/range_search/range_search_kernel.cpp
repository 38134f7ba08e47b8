// CPU body of range_search, compiled once per instruction set.
#include "range_search.h"

#include "../../core/simd.h"

namespace pyobserver::PYOBS_ISA {
namespace {

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

BinSpan greedy_l2(const double* counts, int32_t bins, double width, double total,
                  int64_t num_levels, const SearchScratch& scratch) {
  // scaling by a power of two changes no decision, and keeps the cubes inside float32
  int exponent = 0;
  const double bin_width = __builtin_frexp(width, &exponent);
  const Occupied occupied = find_occupied(counts, bins, static_cast<float>(bin_width), scratch);
  GreedySearch search = start_search(scratch.cumulative, bins, total);
  for (BinSpan next; next_span(&search, &next);) {
    const ErrorParams params = error_params(bin_width, next, num_levels);
    if (!keep_span(&search, next, sum_errors(occupied, next, num_levels, params))) {
      break;
    }
  }
  return search.span;
}

}  // namespace

extern const RangeSearchTable range_search_table = {greedy_l2};

}  // namespace pyobserver::PYOBS_ISA
