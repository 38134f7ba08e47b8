// CUDA kernels and glue of lp_search and lp_error: one launch each, a block for each histogram.
//
// The block fills both sides, eight threads their running sums, each in the order of the CPU. Then
// eight threads together (an octet) try one scale, one for each of the sums that the CPU adds in
// turn; they look for the zero point eight levels at once. A block tries as many scales as it has
// octets in a round, first a coarse part of the grid, then all in descending rows; what is least
// and what is hopeless so far is taken over between rounds alone, so that no result depends on
// timing. 48 bytes a bin are kept, in shared memory up to some 4 thousand bins.
//
// For p other than 2 the powers are those of the device's library, which may differ from the host's
// in the last bit: so may the errors, and the choice between scales whose errors are that near.
#include <optional>

#include "../../core/cuda.h"
#include "../../core/sums.h"
#include "lp_search_glue.h"
#include "lp_sides.h"

namespace pyobserver {
namespace {

constexpr int kThreads = 512;
constexpr int kBlocksPerMultiprocessor = 1;
constexpr int kOctets = kThreads / kSums;  // of a block
constexpr int64_t kCoarse = 16;  // of the grid's scales the first round tries every so many

PYOBS_DEVICE double lesser(double a, double b) { return b < a ? b : a; }

struct Octet {
  int lane;
  uint32_t mask;
};

PYOBS_DEVICE Octet octet_of_thread() {
  const unsigned first = threadIdx.x % kWarp / kSums * kSums;
  return {static_cast<int>(threadIdx.x % kSums), 0xffu << first};
}

template <class T>
PYOBS_DEVICE T of_lane(const Octet& octet, T value, int lane) {
  return __shfl_sync(octet.mask, value, lane, kSums);
}

// In the order of total_of; addition commutes.
PYOBS_DEVICE double total_of(const Octet& octet, double sum) {
  for (int bits = 1; bits < kSums; bits *= 2) {
    sum += __shfl_xor_sync(octet.mask, sum, bits);
  }
  return sum;
}

// Adds term(0) … term(n - 1) to the sums in turn, those beyond the last whole turn to the first.
template <class Term>
PYOBS_DEVICE double add_in_turn(const Octet& octet, double sum, int32_t n, const Term& term) {
  const int32_t whole = n / kSums * kSums;
#pragma unroll 4
  for (int32_t i = octet.lane; i < whole; i += kSums) {
    sum += term(i);
  }
  const double rest = whole + octet.lane < n ? term(whole + octet.lane) : 0.0;
  for (int32_t i = 0; i < n - whole; ++i) {
    const double next = of_lane(octet, rest, i);
    sum = octet.lane == 0 ? sum + next : sum;
  }
  return sum;
}

// Of the counts, for all threads; 0 of a range that is not finite.
PYOBS_DEVICE double total_of_counts(const LpHistogram& h) {
  __shared__ double total;
  if (!has_range(h)) {
    return 0.0;
  }
  if (threadIdx.x < kSums) {
    const Octet octet = octet_of_thread();
    const double sum = add_in_turn(octet, 0.0, h.bins, [&](int32_t bin) { return h.counts[bin]; });
    const double all = total_of(octet, sum);
    if (octet.lane == 0) {
      total = all;
    }
  }
  __syncthreads();
  return total;
}

PYOBS_DEVICE Occupied find_occupied(const LpHistogram& h) {
  int32_t first = h.bins - 1, last = 0;
  for (auto bin = static_cast<int32_t>(threadIdx.x); bin < h.bins; bin += kThreads) {
    if (h.counts[bin] > 0.0) {
      first = bin < first ? bin : first;
      last = bin;
    }
  }
  first = reduce_block(first, h.bins - 1, [](int32_t a, int32_t b) { return b < a ? b : a; });
  last = reduce_block(last, int32_t{0}, [](int32_t a, int32_t b) { return b > a ? b : a; });
  return occupied_of(h, first, last);
}

// The cells of one sign by all threads, each of which takes bins that lie in a row: it counts their
// cells, and adds them behind those of the threads before.
PYOBS_DEVICE Side cells_of(const LpHistogram& h, const Occupied& occupied, int step, double* room) {
  const int32_t bins = occupied.last - occupied.first + 1;
  const int32_t size = (bins + kThreads - 1) / kThreads;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t begin = size * thread < bins ? size * thread : bins;
  const int32_t end = begin + size < bins ? begin + size : bins;
  Cells own = {0, -1.0};
  double from_first = 0.0;
  for_each_cell(h, occupied, step, begin, end, [&](double from, double to, double) {
    from_first = own.reached < 0.0 ? from : from_first;
    own.size += own.reached >= 0.0 && own.reached < from ? 2 : 1;
    own.reached = to;
  });
  const double reached =
      scan_block(own.reached, -1.0, [](double a, double b) { return greatest_of(a, b); }).before;
  own.size += reached >= 0.0 && own.size > 0 && reached < from_first ? 1 : 0;
  const auto sizes = scan_block(own.size, int32_t{0}, [](int32_t a, int32_t b) { return a + b; });
  Side side = empty_side(room, lp_room(h.bins) / kLpArrays);
  Cells cells = {sizes.before, reached};
  for_each_cell(h, occupied, step, begin, end, [&](double from, double to, double count) {
    add_cell(side, &cells, from, to, count);
  });
  side.size = sizes.all;
  return side;
}

// What each cell adds to the running sums, where these will be.
template <class Measure>
PYOBS_DEVICE void fill_terms(const Side& side, const Measure& measure) {
  for (auto i = static_cast<int32_t>(threadIdx.x); i < side.size; i += kThreads) {
    const Moments cell = moments_of_cell(side, i);
    side.below[i + 1] = power_of_cell(side, i, measure);
    side.count[i] = cell.count;
    side.sum[i] = cell.sum;
    side.square[i] = cell.square;
  }
}

// By one thread: running sums of n values, `step` apart, behind a zero.
PYOBS_DEVICE void accumulate(double* values, int32_t begin, int32_t n, int32_t step) {
  constexpr int32_t kAtOnce = 8;  // loads, which do not wait for each other
  double running = 0.0;
  values[begin - step] = 0.0;
  for (int32_t done = 0; done < n; done += kAtOnce) {
    double loaded[kAtOnce];
#pragma unroll
    for (int32_t i = 0; i < kAtOnce; ++i) {
      loaded[i] = done + i < n ? values[begin + (done + i) * step] : 0.0;
    }
#pragma unroll
    for (int32_t i = 0; i < kAtOnce; ++i) {
      running += loaded[i];
      if (done + i < n) {
        values[begin + (done + i) * step] = running;
      }
    }
  }
}

PYOBS_DEVICE void accumulate(const Side& side, int array) {
  if (array == 0) {
    accumulate(side.below, 1, side.size, 1);
  } else {
    double* values = array == 1 ? side.count : array == 2 ? side.sum : side.square;
    accumulate(values, side.size - 1, side.size, -1);
  }
}

template <class Measure>
PYOBS_DEVICE void fill(const LpHistogram& h, double* room, const Measure& measure, Sides* sides) {
  const Occupied occupied = find_occupied(h);
  const Side negative = cells_of(h, occupied, -1, room);
  const Side positive = cells_of(h, occupied, 1, room + negative.size + 2);
  if (threadIdx.x == 0) {
    *sides = {negative, positive};
    add_points(&sides->negative, h, occupied, -1.0);
    add_points(&sides->positive, h, occupied, 1.0);
  }
  __syncthreads();
  fill_terms(sides->negative, measure);
  fill_terms(sides->positive, measure);
  __syncthreads();
  constexpr unsigned kArrays = 4;
  if (threadIdx.x < 2 * kArrays) {
    const bool is_positive = threadIdx.x >= kArrays;
    accumulate(is_positive ? sides->positive : sides->negative,
               static_cast<int>(threadIdx.x % kArrays));
  }
  __syncthreads();
}

// A place on either side.
struct Ends {
  double negative, positive;
};

// Two threads take a side each.
template <class Measure>
PYOBS_DEVICE double beyond(const Octet& octet, const Sides& sides, const Ends& t, const Ends& level,
                           const Measure& measure) {
  const bool positive = octet.lane % 2 == 1;
  const double found =
      beyond(positive ? sides.positive : sides.negative, positive ? t.positive : t.negative,
             positive ? level.positive : level.negative, measure);
  return of_lane(octet, found, 0) + of_lane(octet, found, 1);
}

// As the CPU's.
template <class Measure>
PYOBS_DEVICE double within(const Octet& octet, const Side& side, double s, double t, double before,
                           double most, const Measure& measure) {
  const Steps steps = steps_of(s, measure);
  const Within cells = cells_within(side, s, t);
  double sum = octet.lane == 0 ? side.below[cells.begin] : 0.0;
  for (int32_t start = cells.begin; start < cells.end; start += kCellsAtOnce) {
    const int32_t n = cells.end - start < kCellsAtOnce ? cells.end - start : kCellsAtOnce;
    sum = add_in_turn(octet, sum, n, [&](int32_t i) {
      const double* edge = side.edge + start + i;
      return side.density[start + i] *
             (integral(steps, edge[1], measure) - integral(steps, edge[0], measure));
    });
    if (before + total_of(octet, sum) > most) {
      return kInfinity;
    }
  }
  return add_rest(total_of(octet, sum), side, cells.end, s, t, steps, measure);
}

// As the CPU's, each round with eight levels between those that are known.
template <class Measure>
PYOBS_DEVICE int64_t best_above(const Octet& octet, const Sides& sides, double s, int64_t n,
                                const Measure& measure) {
  int64_t low = 0, high = n;  // the answer is in [low, high]
  while (low < high) {
    const int64_t step = (high - low + kSums) / (kSums + 1);
    const int64_t at = low + step * (octet.lane + 1) - 1;
    const bool enough = at >= high || has_enough(sides, at, n, s, measure);
    const uint32_t votes =
        (__ballot_sync(octet.mask, enough) & octet.mask) >> (__ffs(octet.mask) - 1);
    const int first = votes == 0 ? kSums : __ffs(votes) - 1;
    const int64_t bound = low + step * (first + 1) - 1;
    high = first < kSums && bound < high ? bound : high;
    low += step * first;
  }
  return low;
}

PYOBS_DEVICE Ends ends_of(double below, double above, double s) { return {below * s, above * s}; }

template <class Measure>
PYOBS_DEVICE LpErrors errors_of(const Octet& octet, const Sides& sides, double s, int64_t below,
                                int64_t above, const Measure& measure) {
  const double a = static_cast<double>(below), b = static_cast<double>(above);
  const Ends t = ends_of(a + 0.5, b + 0.5, s);
  LpErrors errors = {};
  errors.clipping = beyond(octet, sides, t, ends_of(a, b, s), measure);
  errors.rounding = within(octet, sides.negative, s, t.negative, 0.0, kInfinity, measure) +
                    within(octet, sides.positive, s, t.positive, 0.0, kInfinity, measure);
  errors.signal = signal(sides.negative, measure) + signal(sides.positive, measure);
  return errors;
}

struct Tried {
  double error;
  int64_t below;
  bool hopeless;  // no smaller scale errs less than the least
};

// Of a scale that errs more than the least the error is any above that.
template <class Measure>
PYOBS_DEVICE Tried try_scale(const Octet& octet, const Sides& sides, const LpGoal& goal, double s,
                             double least, const Measure& measure) {
  const bool split = goal.below < 0;
  const int64_t n = goal.above;
  const Ends widest =
      ends_of(static_cast<double>(split ? n : goal.below), static_cast<double>(n), s);
  if (beyond(octet, sides, widest, widest, measure) > least) {
    return {kInfinity, 0, true};
  }
  const int64_t above = split ? best_above(octet, sides, s, n, of_split(measure)) : n;
  const int64_t below = split ? n - above : goal.below;
  const double a = static_cast<double>(below), b = static_cast<double>(above);
  const Ends t = ends_of(a + 0.5, b + 0.5, s);
  double error = beyond(octet, sides, t, ends_of(a, b, s), measure);
  if (error <= least) {
    error += within(octet, sides.negative, s, t.negative, error, least, measure);
  }
  if (error <= least) {
    error += within(octet, sides.positive, s, t.positive, error, least, measure);
  }
  return {error, below, false};
}

// Of a number that is not NaN, one that is ordered alike.
PYOBS_DEVICE long long to_key(double value) {
  long long bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits ^ ((bits >> 63) & 0x7fffffffffffffffll);
}
PYOBS_DEVICE double from_key(long long key) {
  const long long bits = key ^ ((key >> 63) & 0x7fffffffffffffffll);
  double value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// The least error so far, as a key, and the bits of the greatest scale that is hopeless, 0 of none.
struct Progress {
  long long least;
  unsigned hopeless;
};

// Scale number `index` of all: those of the rows, then the grid's.
PYOBS_DEVICE double scale_at(const LpScales& scales, int64_t index) {
  for (int row = 0; row < LpScales::kRows; ++row) {
    const int64_t count = level_count(scales, row);
    if (index < count) {
      return tried_scale(scales, level_scale(scales, row, index));
    }
    index -= count;
  }
  return tried_scale(scales, grid_scale(scales, index));
}

struct Best {
  double error;
  float scale;
  int64_t below;
};

PYOBS_DEVICE bool is_better(const Best& one, const Best& other) {
  return one.error < other.error || (one.error == other.error && one.scale > other.scale);
}

// The best scale that this thread's octet has tried.
template <class Measure>
PYOBS_DEVICE Best try_scales(const Octet& octet, const Sides& sides, const LpGoal& goal,
                             const LpScales& scales, Best best, const Measure& measure) {
  __shared__ Progress progress;
  if (threadIdx.x == 0) {
    progress = {to_key(kInfinity), 0};
  }
  int64_t others = 0;
  for (int row = 0; row < LpScales::kRows; ++row) {
    others += level_count(scales, row);
  }
  const int64_t own = threadIdx.x / kSums;
  const int64_t coarse = is_power_of_two(scales.constraint) ? 1 : kCoarse;
  for (int64_t begin = -kOctets;; begin += kOctets) {
    __syncthreads();
    const double least = from_key(progress.least);
    const double hopeless = static_cast<double>(bits_to_float(progress.hopeless));
    // below the scale before this round there is nothing
    if (begin > others && scale_at(scales, begin - 1) <= greatest_of(hopeless, scales.least)) {
      return best;
    }
    __syncthreads();  // all have read
    const double s = scale_at(scales, begin < 0 ? others + coarse * own : begin + own);
    if (s > hopeless) {
      const Tried tried = try_scale(octet, sides, goal, s, least, measure);
      const Best found = {tried.error, static_cast<float>(s), tried.below};
      best = is_better(found, best) ? found : best;
      if (octet.lane == 0 && tried.hopeless) {
        atomicMax(&progress.hopeless, float_to_bits(found.scale));
      } else if (octet.lane == 0 && tried.error < least) {
        atomicMin(&progress.least, to_key(tried.error));
      }
    }
  }
}

// The best of all octets, for all threads.
PYOBS_DEVICE Best best_of_block(const Best& own) {
  Best best;
  best.error = reduce_block(own.error, kInfinity, lesser);
  const bool equal = own.error == best.error;
  best.scale =
      reduce_block(equal ? own.scale : 0.0f, 0.0f, [](float a, float b) { return b > a ? b : a; });
  // one for each scale
  best.below = reduce_block(equal && own.scale == best.scale ? own.below : int64_t{0}, int64_t{0},
                            [](int64_t a, int64_t b) { return b > a ? b : a; });
  return best;
}

// For the first octet.
template <class Measure>
PYOBS_DEVICE LpChoice search(const Sides& sides, const LpGoal& goal, const Measure& measure) {
  const Octet octet = octet_of_thread();
  const bool split = goal.below < 0;
  const double negative = extreme(sides.negative), positive = extreme(sides.positive);
  Best best = {kInfinity, 1.0f, split ? 0 : goal.below};
  if (unclipped_scale(goal, negative, positive) > 0.0) {  // else no scale changes anything
    __shared__ LpScales scales;
    if (threadIdx.x == 0) {
      scales = lp_scales(goal, negative, positive);
    }
    __syncthreads();
    best = best_of_block(try_scales(octet, sides, goal, scales, best, measure));
  }
  LpChoice choice = {best.scale, best.below, {}};
  if (threadIdx.x < kSums) {
    const int64_t above = split ? goal.above - best.below : goal.above;
    choice.errors = errors_of(octet, sides, best.scale, best.below, above, measure);
  }
  return choice;
}

template <class Measure>
__global__ void __launch_bounds__(kThreads)
    lp_search_kernel(LpSearchArgs args, Measure measure, DeviceSwitch enabled,
                     MemoryOfBlocks memory) {
  __shared__ Sides sides;
  if (is_off(enabled)) {
    return;
  }
  auto* room = reinterpret_cast<double*>(memory_of_block(memory));
  const LpGoal goal = goal_of(args);
  for (int64_t i = blockIdx.x; i < args.histograms.count; i += gridDim.x) {
    const LpHistogram histogram = histogram_at(args.histograms, i);
    const double total = total_of_counts(histogram);
    LpChoice choice = {};
    if (total > 0.0) {
      fill(histogram, room, measure, &sides);
      choice = search(sides, goal, measure);
    }
    if (threadIdx.x == 0) {
      write_choice(args, i, choice, total);
    }
    __syncthreads();  // the room is free again
  }
}

template <class Measure>
__global__ void __launch_bounds__(kThreads)
    lp_error_kernel(LpErrorArgs args, Measure measure, MemoryOfBlocks memory, double* errors) {
  __shared__ Sides sides;
  auto* room = reinterpret_cast<double*>(memory_of_block(memory));
  for (int64_t i = blockIdx.x; i < args.histograms.count; i += gridDim.x) {
    const LpHistogram histogram = histogram_at(args.histograms, i);
    const LpAsked asked = asked_of(args, i);
    const double total = total_of_counts(histogram);
    LpErrors found = no_errors(total);
    if (total > 0.0 && asked.usable) {
      fill(histogram, room, measure, &sides);
      if (threadIdx.x < kSums) {
        found = errors_of(octet_of_thread(), sides, asked.scale, asked.below, asked.above, measure);
      }
    }
    if (threadIdx.x == 0) {
      write_errors(found, total, errors + kLpErrors * i);
    }
    __syncthreads();  // the room is free again
  }
}

// Calls body(measure) for an exponent.
template <class Body>
void with_measure(double p, const Body& body) {
  if (p == 2.0) {
    body(Square{});
  } else {
    body(Power{p});
  }
}

int64_t room_bytes(const LpHistograms& histograms) {
  return lp_room(histograms.bins) * static_cast<int64_t>(sizeof(double));
}

void lp_search(const Tensor& counts, const Tensor& edges, const Tensor& min_val,
               const Tensor& max_val, const Tensor& scale, const Tensor& zero_point,
               const Tensor& error, int64_t quant_min, int64_t quant_max, double p,
               std::optional<int64_t> fixed_zero_point, int64_t constraint,
               std::optional<Tensor> eps, std::optional<Tensor> enabled) {
  const LpSearchArgs args =
      parse_lp_search(counts, edges, min_val, max_val, scale, zero_point, error, quant_min,
                      quant_max, p, fixed_zero_point, constraint, eps);
  const DeviceSwitch flag = device_switch(kLpSearch, "enabled", enabled, counts);
  if (args.histograms.count == 0) {
    return;
  }
  const CudaContext cuda(kLpSearch, counts);
  const unsigned blocks = cuda.blocks(args.histograms.count, 1, kBlocksPerMultiprocessor);
  const BlockMemory memory(cuda, counts, room_bytes(args.histograms), blocks);
  with_measure(p, [&](const auto& measure) {
    using Measure = std::decay_t<decltype(measure)>;
    cuda.launch(lp_search_kernel<Measure>, blocks, kThreads, memory.shared_bytes(), args, measure,
                flag, memory.of_blocks());
  });
}

Tensor lp_error(const Tensor& counts, const Tensor& edges, const Tensor& min_val,
                const Tensor& max_val, const Tensor& scale, const Tensor& zero_point,
                int64_t quant_min, int64_t quant_max, double p) {
  const LpErrorArgs args =
      parse_lp_error(counts, edges, min_val, max_val, scale, zero_point, quant_min, quant_max, p);
  const Tensor error = empty_errors(counts);
  if (args.histograms.count == 0) {
    return error;
  }
  const CudaContext cuda(kLpError, counts);
  const unsigned blocks = cuda.blocks(args.histograms.count, 1, kBlocksPerMultiprocessor);
  const BlockMemory memory(cuda, counts, room_bytes(args.histograms), blocks);
  with_measure(p, [&](const auto& measure) {
    using Measure = std::decay_t<decltype(measure)>;
    cuda.launch(lp_error_kernel<Measure>, blocks, kThreads, memory.shared_bytes(), args, measure,
                memory.of_blocks(), mutable_data<double>(error));
  });
  return error;
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CUDA, m) {
  m.impl("lp_search", TORCH_BOX(&pyobserver::lp_search));
  m.impl("lp_error", TORCH_BOX(&pyobserver::lp_error));
}
