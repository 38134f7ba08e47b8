// CPU body of kl_search, compiled once per instruction set.
#include "kl_search.h"

namespace pyobserver::PYOBS_ISA {
namespace {

constexpr int32_t kChunk = 128;

// False for a histogram that is empty or not finite.
bool sum_counts(const double* counts, int64_t bins, KlSums* sums) {
  double most = 0.0;
  for (int64_t bin = 0; bin < bins; ++bin) {
    const double count = kl_count(counts, bin);
    most = count > most ? count : most;
  }
  if (!has_kl_counts(most)) {
    return false;
  }
  const KlUnit unit = kl_unit(most, bins);
  sums[0] = {0, 0, 0};
  for (int64_t bin = 0; bin < bins; ++bin) {
    const double count = kl_count(counts, bin);
    sums[bin + 1].counts = sums[bin].counts + kl_integer(count, unit);
    sums[bin + 1].occupied = sums[bin].occupied + (count > 0.0 ? 1 : 0);
  }
  return true;
}

void sum_entropies(int64_t bins, double share, KlSums* sums) {
  for (int64_t bin = 0; bin < bins; ++bin) {
    sums[bin + 1].entropy =
        sums[bin].entropy + kl_entropy(sums[bin + 1].counts - sums[bin].counts, share);
  }
}

void level_edges(int64_t kept, double step, int32_t first_level, int32_t levels, int32_t size,
                 int32_t* edges) {
  for (int32_t i = 0; i <= size; ++i) {
    edges[i] = kl_edge(first_level + i, step);
  }
  if (first_level + size == levels) {
    edges[size] = static_cast<int32_t>(kept);
  }
}

double sum_levels(const KlSums* sums, int64_t kept, int32_t levels, double share, KlLevel* last) {
  const double step = static_cast<double>(kept) / static_cast<double>(levels);
  int32_t edges[kChunk + 1];
  double occupied[kChunk], counts[kChunk], entropy[kChunk];
  double total = 0.0;
  for (int32_t first = 0; first < levels; first += kChunk) {
    const int32_t size = levels - first < kChunk ? levels - first : kChunk;
    level_edges(kept, step, first, levels, size, edges);
    for (int32_t i = 0; i < size; ++i) {
      const KlLevel level = kl_level(sums[edges[i]], sums[edges[i + 1]], share);
      occupied[i] = level.occupied;
      counts[i] = level.counts;
      entropy[i] = level.entropy;
    }
    *last = {occupied[size - 1], counts[size - 1], entropy[size - 1]};
    for (int32_t i = 0; i < size; ++i) {
      entropy[i] = level_divergence(occupied[i], counts[i], entropy[i]);
    }
    for (int32_t i = 0; i < size; ++i) {
      total += entropy[i];
    }
  }
  return total;
}

double divergence(const KlSums* sums, int64_t bins, int64_t kept, int64_t num_levels,
                  double share) {
  if (has_empty_end(sums, bins, kept)) {
    return __builtin_huge_val();
  }
  KlLevel last;
  const double within = sum_levels(sums, kept, kl_levels(kept, num_levels), share, &last);
  return kl_divergence(sums, bins, kept, within, last, share);
}

int64_t search(const double* counts, int64_t bins, int64_t num_levels, int64_t start,
               int64_t stride, const KlScratch& scratch) {
  if (!sum_counts(counts, bins, scratch.sums)) {
    return bins;
  }
  const double share = kl_share(scratch.sums[bins].counts);
  sum_entropies(bins, share, scratch.sums);
  const int64_t candidates = (bins - start) / stride + 1;
  double best = __builtin_huge_val();
  for (int64_t i = 0; i < candidates; ++i) {
    const double found = divergence(scratch.sums, bins, start + i * stride, num_levels, share);
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
