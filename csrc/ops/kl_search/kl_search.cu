// CUDA kernel and glue of kl_search: one launch, a block for each histogram.
//
// Sums of integers are scanned by the block; then every thread takes whole candidates, whose levels
// it adds in their order. 32 bytes a bin are kept, in shared memory up to some 7 thousand bins: the
// counts are read from the device twice.
#include <optional>

#include "../../core/cuda.h"
#include "kl_search_glue.h"

namespace pyobserver {
namespace {

constexpr int kMostThreads = 512;  // fewer where there are fewer bins
constexpr int kBlocksPerMultiprocessor = 2;

PYOBS_HD int64_t room_bytes(int64_t bins) {
  return static_cast<int64_t>(sizeof(KlSums) + sizeof(double)) * (bins + 1);
}

PYOBS_DEVICE KlScratch room_of(unsigned char* memory, int64_t bins) {
  auto* sums = reinterpret_cast<KlSums*>(memory);
  return {sums, reinterpret_cast<double*>(sums + bins + 1)};
}

PYOBS_DEVICE double least_of_block(double value) {
  return reduce_block(value, __builtin_huge_val(),
                      [](double a, double b) { return b < a ? b : a; });
}
PYOBS_DEVICE double most_of_block(double value) {
  return reduce_block(value, 0.0, [](double a, double b) { return b > a ? b : a; });
}
PYOBS_DEVICE int64_t most_of_block(int64_t value) {
  return reduce_block(value, int64_t{-1}, [](int64_t a, int64_t b) { return b > a ? b : a; });
}

// The bins of a thread: adjacent ones, so that sums go on from bin to bin.
struct Run {
  int64_t begin, end;
};

PYOBS_DEVICE Run run_of_thread(int64_t bins) {
  const int64_t size = (bins + blockDim.x - 1) / blockDim.x;
  const int64_t begin = size * threadIdx.x < bins ? size * threadIdx.x : bins;
  return {begin, begin + size < bins ? begin + size : bins};
}

// The sums of what a bin holds, before each bin: the field of KlSums that `of` names.
template <class Value>
PYOBS_DEVICE void scan_bins(int64_t bins, KlSums* sums, int64_t KlSums::* of, const Value& value) {
  const Run run = run_of_thread(bins);
  int64_t own = 0;
  for (int64_t bin = run.begin; bin < run.end; ++bin) {
    own += value(bin);
  }
  int64_t running = scan_block(own, int64_t{0}, [](int64_t a, int64_t b) { return a + b; }).before;
  for (int64_t bin = run.begin; bin < run.end; ++bin) {
    running += value(bin);
    sums[bin + 1].*of = running;
  }
  if (threadIdx.x == 0) {
    sums[0].*of = 0;
  }
  __syncthreads();
}

// False for a histogram that is empty or not finite. `share` is what kl_share gives.
PYOBS_DEVICE bool fill(const double* counts, int64_t bins, KlSums* sums, double* share) {
  double most = 0.0;
  for (int64_t bin = threadIdx.x; bin < bins; bin += blockDim.x) {
    const double count = kl_count(counts, bin);
    most = count > most ? count : most;
  }
  most = most_of_block(most);
  if (!has_kl_counts(most)) {
    return false;
  }
  const KlUnit unit = kl_unit(most, bins);
  scan_bins(bins, sums, &KlSums::counts,
            [&](int64_t bin) { return kl_integer(kl_count(counts, bin), unit); });
  // a bin with a count has an integer
  const auto integer = [&](int64_t bin) { return sums[bin + 1].counts - sums[bin].counts; };
  scan_bins(bins, sums, &KlSums::occupied,
            [&](int64_t bin) { return int64_t{integer(bin) > 0 ? 1 : 0}; });
  *share = kl_share(sums[bins].counts);
  scan_bins(bins, sums, &KlSums::entropy,
            [&](int64_t bin) { return kl_entropy(integer(bin), *share); });
  return true;
}

PYOBS_DEVICE double divergence(const KlSums* sums, int64_t bins, int64_t kept, int64_t num_levels,
                               double share) {
  if (has_empty_end(sums, bins, kept)) {
    return __builtin_huge_val();
  }
  const int32_t levels = kl_levels(kept, num_levels);
  const double step = static_cast<double>(kept) / static_cast<double>(levels);
  double within = 0.0;
  KlLevel level = {};
  KlSums begin = sums[0];
  for (int32_t i = 1; i <= levels; ++i) {
    const KlSums end = sums[i == levels ? kept : kl_edge(i, step)];
    level = kl_level(begin, end, share);
    within += level_divergence(level.occupied, level.counts, level.entropy);
    begin = end;
  }
  return kl_divergence(sums, bins, kept, within, level, share);
}

PYOBS_DEVICE int64_t search(const KlSearchArgs& args, const double* counts, const KlScratch& room) {
  double share = 0.0;
  if (!fill(counts, args.bins, room.sums, &share)) {
    return args.bins;
  }
  const int64_t candidates = (args.bins - args.start) / args.stride + 1;
  double best = __builtin_huge_val();
  for (int64_t i = threadIdx.x; i < candidates; i += blockDim.x) {
    const double found =
        divergence(room.sums, args.bins, args.start + i * args.stride, args.num_levels, share);
    room.divergences[i] = found;
    best = found < best ? found : best;
  }
  best = least_of_block(best) + kEqualDivergence;
  int64_t last = -1;
  for (int64_t i = threadIdx.x; i < candidates; i += blockDim.x) {  // its own
    last = room.divergences[i] <= best ? i : last;
  }
  return args.start + most_of_block(last) * args.stride;
}

__global__ void __launch_bounds__(kMostThreads)
    kl_search_kernel(KlSearchArgs args, DeviceSwitch enabled, MemoryOfBlocks memory,
                     int64_t* kept) {
  const KlScratch room = room_of(memory_of_block(memory), args.bins);
  const bool off = is_off(enabled);
  for (int64_t i = blockIdx.x; i < args.histograms; i += gridDim.x) {
    const int64_t found = off ? args.bins : search(args, args.counts + i * args.bins, room);
    if (threadIdx.x == 0) {
      kept[i] = found;
    }
    __syncthreads();  // the room is free again
  }
}

Tensor kl_search(const Tensor& counts, int64_t num_levels, int64_t start_bin, int64_t stride,
                 std::optional<Tensor> enabled) {
  const KlSearchArgs args = parse_kl_search(counts, num_levels, start_bin, stride);
  const DeviceSwitch flag = device_switch(kKlSearch, "enabled", enabled, counts);
  const Tensor result = empty_result(counts);
  if (args.histograms == 0) {
    return result;
  }
  const CudaContext cuda(kKlSearch, counts);
  const unsigned blocks = cuda.blocks(args.histograms, 1, kBlocksPerMultiprocessor);
  const int64_t threads = std::min<int64_t>(kMostThreads, (args.bins + kWarp - 1) / kWarp * kWarp);
  const BlockMemory memory(cuda, counts, room_bytes(args.bins), blocks);
  cuda.launch(kl_search_kernel, blocks, static_cast<unsigned>(threads), memory.shared_bytes(), args,
              flag, memory.of_blocks(), mutable_data<int64_t>(result));
  return result;
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CUDA, m) {
  m.impl("kl_search", TORCH_BOX(&pyobserver::kl_search));
}
