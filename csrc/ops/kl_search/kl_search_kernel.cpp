// CPU body of kl_search, compiled once per instruction set.
#include "kl_search.h"

namespace pyobserver::PYOBS_ISA {
namespace {

constexpr int32_t kChunk = 128;

// What is not positive counts as empty, and the first bin has the counts of the second: zeros of an
// activation, which would outweigh all else, are exact on any grid.
double count_of(const double* counts, int64_t bin) {
  const double count = counts[bin == 0 ? 1 : bin];
  return count > 0.0 ? count : 0.0;
}

// The counts as integers in a unit that keeps their sum below 2^62; one at least where there is
// any count. False for a histogram that is empty or not finite.
bool sum_counts(const double* counts, int64_t bins, KlSums* sums) {
  double most = 0.0;
  for (int64_t bin = 0; bin < bins; ++bin) {
    const double count = count_of(counts, bin);
    most = count > most ? count : most;
  }
  if (!(most > 0.0) || most == __builtin_huge_val()) {
    return false;
  }
  int exponent = 0;
  __builtin_frexp(most, &exponent);
  int shift = 62 - exponent;
  for (int64_t room = 1; room < bins; room *= 2) {
    --shift;
  }
  // 2^shift alone may be no float64
  const int half = shift >> 1;
  const double scale = __builtin_ldexp(1.0, half), rest = __builtin_ldexp(1.0, shift - half);
  sums[0] = {0, 0, 0};
  for (int64_t bin = 0; bin < bins; ++bin) {
    const double count = count_of(counts, bin);
    const auto scaled = static_cast<int64_t>(__builtin_rint(count * scale * rest));
    const int64_t occupied = count > 0.0 ? 1 : 0;
    sums[bin + 1].counts = sums[bin].counts + (scaled > occupied ? scaled : occupied);
    sums[bin + 1].occupied = sums[bin].occupied + occupied;
  }
  return true;
}

// A power of two that makes the total a number in [1/2, 1).
double unit_of(int64_t total) {
  double unit = 1.0;
  for (; total > 0; total /= 2) {
    unit /= 2;
  }
  return unit;
}

void sum_entropies(int64_t bins, double unit, KlSums* sums) {
  for (int64_t bin = 0; bin < bins; ++bin) {
    const double share = static_cast<double>(sums[bin + 1].counts - sums[bin].counts) * unit;
    const double entropy = share * -kl_log(share);
    sums[bin + 1].entropy =
        sums[bin].entropy + static_cast<int64_t>(__builtin_rint(entropy * (1.0 / kEntropyUnit)));
  }
}

// The first bin of each level: numpy.linspace(0, kept, levels + 1), rounded up.
void level_edges(int64_t kept, double step, int32_t first_level, int32_t levels, int32_t size,
                 int32_t* edges) {
  for (int32_t i = 0; i <= size; ++i) {
    edges[i] = static_cast<int32_t>(__builtin_ceil(static_cast<double>(first_level + i) * step));
  }
  if (first_level + size == levels) {
    edges[size] = static_cast<int32_t>(kept);
  }
}

struct LastLevel {
  double occupied, counts;
};

double sum_levels(const KlSums* sums, int64_t kept, int32_t levels, double unit, LastLevel* last) {
  const double step = static_cast<double>(kept) / static_cast<double>(levels);
  int32_t edges[kChunk + 1];
  double occupied[kChunk], counts[kChunk], entropy[kChunk];
  double total = 0.0;
  for (int32_t first = 0; first < levels; first += kChunk) {
    const int32_t size = levels - first < kChunk ? levels - first : kChunk;
    level_edges(kept, step, first, levels, size, edges);
    for (int32_t i = 0; i < size; ++i) {
      const KlSums& begin = sums[edges[i]];
      const KlSums& end = sums[edges[i + 1]];
      occupied[i] = static_cast<double>(end.occupied - begin.occupied);
      counts[i] = static_cast<double>(end.counts - begin.counts) * unit;
      entropy[i] = static_cast<double>(end.entropy - begin.entropy) * kEntropyUnit;
    }
    *last = {occupied[size - 1], counts[size - 1]};
    for (int32_t i = 0; i < size; ++i) {
      entropy[i] = level_divergence(occupied[i], counts[i], entropy[i]);
    }
    for (int32_t i = 0; i < size; ++i) {
      total += entropy[i];
    }
  }
  return total;
}

// The divergence of a candidate, times the total.
double divergence(const KlSums* sums, int64_t bins, int64_t kept, int64_t num_levels, double unit) {
  const int64_t total = sums[bins].counts;
  const int64_t dropped = total - sums[kept].counts;
  const int64_t end = sums[kept].counts - sums[kept - 1].counts;
  if (dropped > 0 && end == 0) {
    return __builtin_huge_val();
  }
  // with more levels than bins each bin has its own all the same
  const auto levels = static_cast<int32_t>(num_levels < kept ? num_levels : kept);
  LastLevel last;
  const double within = sum_levels(sums, kept, levels, unit, &last);
  if (dropped == 0) {
    return within;
  }
  const double moved = static_cast<double>(dropped) * unit;
  const double raised = static_cast<double>(end + dropped) * unit;
  const double entropy =
      static_cast<double>(sums[kept].entropy - sums[kept - 1].entropy) * kEntropyUnit;
  const double at_end =
      raised * kl_log(raised) + entropy - moved * kl_log(last.counts / last.occupied);
  const double whole = static_cast<double>(total) * unit;
  const double share = static_cast<double>(sums[kept].counts) * unit / whole;
  return within + at_end + whole * kl_log(share);
}

int64_t search(const double* counts, int64_t bins, int64_t num_levels, int64_t start,
               int64_t stride, const KlScratch& scratch) {
  if (!sum_counts(counts, bins, scratch.sums)) {
    return bins;
  }
  const double unit = unit_of(scratch.sums[bins].counts);
  sum_entropies(bins, unit, scratch.sums);
  const int64_t candidates = (bins - start) / stride + 1;
  double best = __builtin_huge_val();
  for (int64_t i = 0; i < candidates; ++i) {
    const double found = divergence(scratch.sums, bins, start + i * stride, num_levels, unit);
    scratch.divergences[i] = found;
    best = found < best ? found : best;
  }
  best += kEqualDivergence;
  int64_t last = candidates - 1;
  while (!(scratch.divergences[last] <= best)) {
    --last;
  }
  return start + last * stride;
}

}  // namespace

extern const KlSearchTable kl_search_table = {search};

}  // namespace pyobserver::PYOBS_ISA
