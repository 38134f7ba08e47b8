// CUDA kernels and glue of minmax. Every value is read once, 16 bytes at a time where memory
// allows, and the state is all that is written: one launch.
//
//   runs:    the values of a range lie in rows that are long, or few: a block goes along them;
//   where
//            ranges are many and small, a team of a warp's lanes does
//   columns: rows are short (channels last): a thread keeps to its columns, going down the rows
//
// Where several blocks work for a range, what they find meets in scratch memory, by maxima of
// integers that are in the order of floats, and the last of them folds it into the state.
#include "minmax.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "../../core/device_walk.cuh"
#include "minmax_cuda.cuh"

namespace pyobserver {
namespace {

constexpr const char* kOp = "minmax";
constexpr int kThreads = 256;
constexpr int kMostThreads = 1024;  // of a block that is alone
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int kTasksPerMultiprocessor = 32;  // where there are many small ones
constexpr int kAhead = 4;                    // loads of a thread in flight
constexpr int64_t kBlockBytes = 32 << 10;    // at least, for each of several blocks of a range
constexpr int64_t kAloneBytes = 128 << 10;   // at most, for one block
constexpr int64_t kTeamBytes = 16 << 10;     // at most, of a range that lanes of a warp take
constexpr int64_t kShortRun = 128;           // values, from which on rows are not taken as columns
constexpr int64_t kLeastRows = 4;            // of columns
constexpr int64_t kColumnBytes = 4 << 10;    // at least, of a piece that is taken as columns

// A range as two integers whose maxima are those of its ends. 0 is below all, NaN above.
struct Keys {
  uint32_t low, high;  // of the least value negated; of the greatest
};

constexpr uint32_t kEmptyKey = 0x007fffffu;  // of -inf
constexpr Keys kEmptyKeys = {kEmptyKey, kEmptyKey};

PYOBS_DEVICE uint32_t key_of(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t ordered = bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
  return value == value ? ordered : 0xffffffffu;
}

PYOBS_DEVICE float value_of_key(uint32_t key) {
  return bits_to_float(key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}

PYOBS_DEVICE uint32_t most_key(uint32_t a, uint32_t b) { return a > b ? a : b; }

PYOBS_DEVICE Keys merge(const Keys& a, const Keys& b) {
  return {most_key(a.low, b.low), most_key(a.high, b.high)};
}

PYOBS_DEVICE void merge_atomically(const Keys& keys, uint32_t* low, uint32_t* high) {
  atomicMax(low, keys.low);
  atomicMax(high, keys.high);
}

// Values as they are compared: words of a float, or of two halves.
struct FloatWord {
  static constexpr int values = 1;
  static constexpr uint32_t infinity = 0x7f800000u;
};
struct HalfWord {
  static constexpr int values = 2;
  static constexpr uint32_t infinity = 0x7c007c00u;
};
struct BFloat16Word {
  static constexpr int values = 2;
  static constexpr uint32_t infinity = 0x7f807f80u;
};

PYOBS_DEVICE float value_of(FloatWord, uint32_t word, int) { return bits_to_float(word); }
PYOBS_DEVICE float value_of(HalfWord, uint32_t word, int index) {
  return to_float(Half{static_cast<uint16_t>(word >> (16 * index))});
}
PYOBS_DEVICE float value_of(BFloat16Word, uint32_t word, int index) {
  return to_float(BFloat16{static_cast<uint16_t>(word >> (16 * index))});
}

// The least and the greatest of each two values; NaN where either is.
#if defined(__CUDA_ARCH__)
#define PYOBS_EXTREMES(Word, type)                                      \
  PYOBS_DEVICE uint32_t least(Word, uint32_t a, uint32_t b) {           \
    uint32_t found;                                                     \
    asm("min.NaN." type " %0, %1, %2;" : "=r"(found) : "r"(a), "r"(b)); \
    return found;                                                       \
  }                                                                     \
  PYOBS_DEVICE uint32_t most(Word, uint32_t a, uint32_t b) {            \
    uint32_t found;                                                     \
    asm("max.NaN." type " %0, %1, %2;" : "=r"(found) : "r"(a), "r"(b)); \
    return found;                                                       \
  }
PYOBS_EXTREMES(FloatWord, "f32")
PYOBS_EXTREMES(HalfWord, "f16x2")
PYOBS_EXTREMES(BFloat16Word, "bf16x2")
#undef PYOBS_EXTREMES
#else
template <class Word>
PYOBS_DEVICE uint32_t extreme(Word kind, uint32_t a, uint32_t b, bool greatest) {
  constexpr int kBits = 32 / Word::values;
  uint32_t found = 0;
  for (int i = 0; i < Word::values; ++i) {
    const float left = value_of(kind, a, i), right = value_of(kind, b, i);
    const bool first = left != left || (greatest ? left > right : left < right);
    const uint32_t part = (first ? a : b) >> (kBits * i) << (32 - kBits);
    found |= part >> (32 - kBits) << (kBits * i);
  }
  return found;
}
template <class Word>
PYOBS_DEVICE uint32_t least(Word kind, uint32_t a, uint32_t b) {
  return extreme(kind, a, b, false);
}
template <class Word>
PYOBS_DEVICE uint32_t most(Word kind, uint32_t a, uint32_t b) {
  return extreme(kind, a, b, true);
}
#endif

template <class Word>
constexpr uint32_t kSigns = Word::values == 1 ? 0x80000000u : 0x80008000u;

// The sign bits of the values that are NaN or infinite.
template <class Word>
PYOBS_DEVICE uint32_t not_finite(uint32_t word) {
  return ((word & ~kSigns<Word>)+(kSigns<Word> - Word::infinity)) & kSigns<Word>;
}

// The word with `other` for the values of those signs.
template <class Word>
PYOBS_DEVICE uint32_t replace(uint32_t word, uint32_t signs, uint32_t other) {
  constexpr int kBits = 32 / Word::values;
  const uint32_t mask = (signs >> (kBits - 1)) * (0xffffffffu >> (32 - kBits));
  return (word & ~mask) | (other & mask);
}

template <class T>
struct WordOf {
  using type = FloatWord;
};
template <>
struct WordOf<Half> {
  using type = HalfWord;
};
template <>
struct WordOf<BFloat16> {
  using type = BFloat16Word;
};

// What a thread has found in loads of so many values: place by place, the extremes of all loads.
template <class T, int values>
struct Found {
  using Word = typename WordOf<T>::type;
  // a single half is there twice
  static constexpr int words = values == 1 ? 1 : values / Word::values;
  uint32_t low[words], high[words];
  uint32_t nonfinite;  // of one thread: fewer than 2^32
};

template <class T, int values>
PYOBS_DEVICE void clear_extremes(Found<T, values>* found) {
  using Word = typename Found<T, values>::Word;
  for (int w = 0; w < Found<T, values>::words; ++w) {
    found->low[w] = Word::infinity;
    found->high[w] = Word::infinity | kSigns<Word>;
  }
}

template <class T, int values>
PYOBS_DEVICE float least_value(const Found<T, values>& found, int i) {
  using Word = typename Found<T, values>::Word;
  return value_of(Word(), found.low[i / Word::values], i % Word::values);
}
template <class T, int values>
PYOBS_DEVICE float greatest_value(const Found<T, values>& found, int i) {
  using Word = typename Found<T, values>::Word;
  return value_of(Word(), found.high[i / Word::values], i % Word::values);
}

template <class T, int values>
PYOBS_DEVICE Keys keys_at(const Found<T, values>& found, int i) {
  return {key_of(-least_value(found, i)), key_of(greatest_value(found, i))};
}

template <class T, int values>
PYOBS_DEVICE Keys keys_of(const Found<T, values>& found) {
  Keys keys = keys_at(found, 0);
  for (int i = 1; i < values; ++i) {
    keys = merge(keys, keys_at(found, i));
  }
  return keys;
}

PYOBS_DEVICE uint32_t word_of(float value) { return float_to_bits(value); }
PYOBS_DEVICE uint32_t word_of(double value) { return float_to_bits(to_float(value)); }
PYOBS_DEVICE uint32_t word_of(Half value) { return value.bits * 0x00010001u; }
PYOBS_DEVICE uint32_t word_of(BFloat16 value) { return value.bits * 0x00010001u; }

template <class T>
PYOBS_DEVICE void load_words(const T* from, uint32_t (&words)[1]) {
  words[0] = word_of(*from);
}
template <class T>
PYOBS_DEVICE void load_words(const T* from, uint32_t (&words)[4]) {
  const auto pack = *reinterpret_cast<const Pack<uint32_t>*>(from);
  for (int w = 0; w < 4; ++w) {
    words[w] = pack.values[w];
  }
}
PYOBS_DEVICE void load_words(const double* from, uint32_t (&words)[2]) {
  const auto pack = *reinterpret_cast<const Pack<double>*>(from);
  words[0] = word_of(pack.values[0]);
  words[1] = word_of(pack.values[1]);
}

// Takes loads, each `step` after the one before; those that are not among the `left` ones from the
// first on repeat it.
template <class T, int values, int words>
PYOBS_DEVICE void take(const uint32_t (&given)[kAhead][words], int64_t left, int64_t step,
                       bool ignore, Found<T, values>* found) {
  using Word = typename Found<T, values>::Word;
  uint32_t low[words], high[words];
  uint32_t flaws = 0;
  for (int w = 0; w < words; ++w) {
    low[w] = high[w] = given[0][w];
    for (int k = 1; k < kAhead; ++k) {
      low[w] = least(Word(), low[w], given[k][w]);
      high[w] = most(Word(), high[w], given[k][w]);
    }
    flaws |= not_finite<Word>(low[w]) | not_finite<Word>(high[w]);
  }
  if (flaws != 0) {
    for (int w = 0; w < words; ++w) {
      for (int k = 0; k < kAhead; ++k) {
        const uint32_t signs = not_finite<Word>(given[k][w]);
        const uint32_t count = values == 1 ? signs != 0 : __popc(signs);
        found->nonfinite += k * step < left ? count : 0u;
        if (ignore) {
          const uint32_t up = replace<Word>(given[k][w], signs, Word::infinity);
          const uint32_t down = replace<Word>(given[k][w], signs, Word::infinity | kSigns<Word>);
          low[w] = k == 0 ? up : least(Word(), low[w], up);
          high[w] = k == 0 ? down : most(Word(), high[w], down);
        }
      }
    }
  }
  for (int w = 0; w < words; ++w) {
    found->low[w] = least(Word(), found->low[w], low[w]);
    found->high[w] = most(Word(), found->high[w], high[w]);
  }
}

// Takes one value, whose word holds nothing else.
template <class T, int values>
PYOBS_DEVICE void take_value(T value, bool ignore, Found<T, values>* found) {
  using Word = typename Found<T, values>::Word;
  const uint32_t word = word_of(value);
  const bool finite = not_finite<Word>(word) == 0;
  found->nonfinite += !finite;
  if (finite || !ignore) {
    found->low[0] = least(Word(), found->low[0], word);
    found->high[0] = most(Word(), found->high[0], word);
  }
}

// The state, and what else the kernels are told about the call.
struct DeviceMinmax {
  float *lows, *highs;
  int64_t* nonfinite_count;
  MinmaxUpdate update;
  float averaging_constant;
  bool ignore;
  DeviceSwitch enabled;
  DeviceQParams qparams;
  uint32_t *low_keys, *high_keys;  // of all ranges; 0 before
  unsigned* finished;              // blocks, of those that share a range; 0 before
};

static __device__ __attribute__((noinline)) void fold_into(const DeviceMinmax& state, int64_t group,
                                                           Keys keys) {
  const Range found = {-value_of_key(keys.low), value_of_key(keys.high)};
  const Range range =
      fold({state.lows[group], state.highs[group]}, found, state.update, state.averaging_constant);
  state.lows[group] = range.low;
  state.highs[group] = range.high;
  if (state.qparams.scales != nullptr) {
    write_qparams(range.low, range.high, group, state.qparams.args, state.qparams.scales,
                  state.qparams.zero_points);
  }
}

// What all blocks found of a range, for the last of them.
PYOBS_DEVICE Keys shared_keys(const DeviceMinmax& state, int64_t group) {
  return {__ldcg(&state.low_keys[group]), __ldcg(&state.high_keys[group])};
}

// Of all threads of a block.
PYOBS_DEVICE void add_nonfinite(const DeviceMinmax& state, int64_t repeat, int64_t found) {
  if (__syncthreads_or(found != 0) == 0) {
    return;
  }
  const auto sum = [](int64_t a, int64_t b) { return a + b; };
  const int64_t total = repeat * reduce_block(found, int64_t{0}, sum);
  if (threadIdx.x == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(state.nonfinite_count),
              static_cast<unsigned long long>(total));
  }
}

// The pieces of a layout, as the kernels go through them: so many sets of kept values, for each of
// which there are `reduced` pieces of `outer` rows.
struct Pieces {
  int64_t kept, reduced, outer;
};

// Where row `row` of the values of a set begins.
PYOBS_DEVICE int64_t row_start(const DeviceLayout& layout, const Pieces& pieces, int64_t set,
                               int64_t row) {
  const int64_t width = layout.channels * layout.inner;
  if (pieces.reduced == 1) {
    return set * layout.piece + row * width;
  }
  int64_t reduced = row / pieces.outer, piece = 0, step = 1;
  for (int axis = layout.over_count - 1; axis >= 0; --axis) {
    const int64_t size = layout.over_size[axis];
    const bool kept = layout.over_group[axis] != 0;
    piece += (kept ? set : reduced) % size * step;
    (kept ? set : reduced) /= size;
    step *= size;
  }
  return piece * layout.piece + row % pieces.outer * width;
}

// Where the kept values of a set begin.
PYOBS_DEVICE int64_t set_start(const DeviceLayout& layout, int64_t set) {
  int64_t start = 0;
  for (int axis = layout.over_count - 1; axis >= 0; --axis) {
    if (layout.over_group[axis] != 0) {
      start += set % layout.over_size[axis] * layout.over_group[axis];
      set /= layout.over_size[axis];
    }
  }
  return start;
}

struct RunsWork {
  Pieces pieces;
  int64_t groups;
  int lanes;                        // of a team, a power of two; a row is one team's
  unsigned row_splits, run_splits;  // blocks that share a group's rows, and each row
};

// Takes values of one range that follow each other, with the other lanes of a team.
template <class T>
PYOBS_DEVICE void take_run(const T* __restrict__ x, const DeviceLayout& layout, int64_t begin,
                           int64_t count, int lane, int lanes, bool ignore,
                           Found<T, Pack<T>::size>* found) {
  constexpr int kValues = Pack<T>::size;
  int64_t head = count, packs = 0;  // values before the first pack
  if (layout.dense) {
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(x + begin) / sizeof(T) % kValues);
    head = past == 0 ? 0 : kValues - past;
    head = head < count ? head : count;
    packs = (count - head) / kValues;
  }
  const int64_t single = count - packs * kValues;
  for (int64_t i = lane; i < single; i += lanes) {
    const int64_t at = begin + (i < head ? i : i + packs * kValues);
    take_value(x[place_of(layout, at)], ignore, found);
  }
  const T* from = x + begin + head;
  for (int64_t pack = lane; pack < packs; pack += kAhead * lanes) {
    uint32_t words[kAhead][Found<T, kValues>::words];
    for (int k = 0; k < kAhead; ++k) {
      const int64_t at = pack + k * lanes;
      load_words(from + (at < packs ? at : pack) * kValues, words[k]);
    }
    take(words, packs - pack, lanes, ignore, found);
  }
}

// The rows [first, rows) of a group, each step'th.
template <class T>
PYOBS_DEVICE void take_rows(const T* __restrict__ x, const DeviceLayout& layout,
                            const RunsWork& work, int64_t group, int64_t first, int64_t step,
                            unsigned part, int lane, bool ignore, Found<T, Pack<T>::size>* found) {
  const int64_t set = work.pieces.kept == 1 ? 0 : group / layout.channels;
  const int64_t channel = group - set * layout.channels;
  constexpr int64_t kGrain = 64;  // values, so that the parts of a row are aligned as it is
  const int64_t grains = layout.inner / kGrain;
  const int64_t begin = part == 0 ? 0 : grains * part / work.run_splits * kGrain;
  const int64_t end =
      part + 1 == work.run_splits ? layout.inner : grains * (part + 1) / work.run_splits * kGrain;
  for (int64_t row = first; row < work.pieces.reduced * work.pieces.outer; row += step) {
    const int64_t start = row_start(layout, work.pieces, set, row) + channel * layout.inner;
    take_run(x, layout, start + begin, end - begin, lane, work.lanes, ignore, found);
  }
}

PYOBS_DEVICE int64_t kept_group(const DeviceLayout& layout, const RunsWork& work, int64_t group) {
  return work.pieces.kept == 1
             ? group
             : set_start(layout, group / layout.channels) + group % layout.channels;
}

// A block for each part of a group.
template <class T>
__global__ void __launch_bounds__(kMostThreads)
    runs_kernel(const T* __restrict__ x, const __grid_constant__ RunsWork work,
                const __grid_constant__ DeviceLayout layout,
                const __grid_constant__ DeviceMinmax state) {
  if (is_off(state.enabled)) {
    return;
  }
  const int lane = static_cast<int>(threadIdx.x % work.lanes);
  const unsigned team = threadIdx.x / work.lanes, teams = blockDim.x / work.lanes;
  const unsigned splits = work.row_splits * work.run_splits;
  Found<T, Pack<T>::size> found;
  found.nonfinite = 0;
  const unsigned tasks = static_cast<unsigned>(work.groups) * splits;
  for (unsigned task = blockIdx.x; task < tasks; task += gridDim.x) {
    const unsigned group = task / splits, split = task % splits;
    clear_extremes(&found);
    take_rows(x, layout, work, group, split / work.run_splits * teams + team,
              static_cast<int64_t>(work.row_splits) * teams, split % work.run_splits, lane,
              state.ignore, &found);
    Keys keys = keys_of(found);
    keys.low = reduce_block(keys.low, uint32_t{0}, most_key);
    keys.high = reduce_block(keys.high, uint32_t{0}, most_key);
    const int64_t kept = kept_group(layout, work, group);
    bool last = true;
    if (splits > 1) {
      if (threadIdx.x == 0) {
        merge_atomically(keys, &state.low_keys[kept], &state.high_keys[kept]);
      }
      last = is_last_block(&state.finished[group], splits);
      if (last) {
        keys = shared_keys(state, kept);
      }
    }
    if (last && threadIdx.x == 0) {
      fold_into(state, kept, keys);
    }
  }
  add_nonfinite(state, layout.repeat, found.nonfinite);
}

// Lanes of a warp for each group.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor - 1)
    teams_kernel(const T* __restrict__ x, const __grid_constant__ RunsWork work,
                 const __grid_constant__ DeviceLayout layout,
                 const __grid_constant__ DeviceMinmax state) {
  if (is_off(state.enabled)) {
    return;
  }
  const int lane = static_cast<int>(threadIdx.x % work.lanes);
  const int64_t step = threads_of_grid() / work.lanes;
  // whole warps, so that every shuffle has all its lanes
  const int64_t of_warp = kWarp / work.lanes;
  const int64_t rounded = (work.groups + of_warp - 1) / of_warp * of_warp;
  Found<T, Pack<T>::size> found;
  found.nonfinite = 0;
  for (int64_t group = thread_of_grid() / work.lanes; group < rounded; group += step) {
    clear_extremes(&found);
    if (group < work.groups) {
      take_rows(x, layout, work, group, 0, 1, 0, lane, state.ignore, &found);
    }
    Keys keys = keys_of(found);
    for (int bits = work.lanes / 2; bits > 0; bits /= 2) {
      keys = merge(keys, {__shfl_xor_sync(kAllLanes, keys.low, bits),
                          __shfl_xor_sync(kAllLanes, keys.high, bits)});
    }
    if (group < work.groups && lane == 0) {
      fold_into(state, kept_group(layout, work, group), keys);
    }
  }
  add_nonfinite(state, layout.repeat, found.nonfinite);
}

// A piece as a matrix whose rows are `period` loads: a few of its own rows, so that they fill whole
// loads. Rows that remain are the tail. A row is cut into tiles, which have whole groups.
struct ColumnsWork {
  Pieces pieces;
  int64_t rows;
  int period, channels, inner;
  int tail;         // values
  int tiles;        // of a piece
  int tile;         // loads
  int tile_groups;  // of all tiles but the last
  int abreast;      // rows that a block takes at a time
  int splits;       // blocks that share a tile
};

// What a block works on; its split of the rows of a tile.
struct Tile {
  int64_t set;
  int first_load, first_group, groups, split;
};

PYOBS_DEVICE Tile tile_of(const ColumnsWork& work, unsigned task) {
  const unsigned index = task / work.splits;
  const int column = static_cast<int>(index % work.tiles);
  const int first_group = column * work.tile_groups;
  const int rest = work.channels - first_group;
  return {static_cast<int64_t>(index / work.tiles), column * work.tile, first_group,
          rest < work.tile_groups ? rest : work.tile_groups, static_cast<int>(task % work.splits)};
}

// Goes down the column `load` of a piece that begins at `start`, from row `first` on.
template <class T, int values>
PYOBS_DEVICE void take_column(const T* __restrict__ x, const DeviceLayout& layout,
                              const ColumnsWork& work, int64_t start, int load, int first,
                              bool ignore, Found<T, values>* found) {
  const int step = work.splits * work.abreast;
  const int64_t stride = static_cast<int64_t>(step) * work.period * values;
  int64_t at = start + (static_cast<int64_t>(first) * work.period + load) * values;
  for (int64_t left = work.rows - first; left > 0; left -= kAhead * step) {
    uint32_t words[kAhead][Found<T, values>::words];
    for (int k = 0; k < kAhead; ++k) {
      const int64_t from = k * step < left ? at + k * stride : at;
      load_words(x + (values == 1 ? place_of(layout, from) : from), words[k]);
    }
    take(words, left, step, ignore, found);
    at += kAhead * stride;
  }
}

// The rows that fill no whole load; returns how many values of the thread are not finite. Where
// there are any, all groups are in one tile.
template <class T>
PYOBS_DEVICE uint32_t merge_tail(const T* __restrict__ x, const ColumnsWork& work, bool ignore,
                                 uint32_t* lows, uint32_t* highs) {
  uint32_t nonfinite = 0;
  for (int i = static_cast<int>(threadIdx.x); i < work.tail; i += kThreads) {
    const float value = to_float(x[i]);
    nonfinite += !is_finite(value);
    if (is_finite(value) || !ignore) {
      const int group = i % (work.channels * work.inner) / work.inner;
      merge_atomically({key_of(-value), key_of(value)}, &lows[group], &highs[group]);
    }
  }
  return nonfinite;
}

// What was found in column `load` goes to the groups of its values.
template <class T, int values>
PYOBS_DEVICE void merge_column(const Found<T, values>& found, const ColumnsWork& work,
                               const Tile& tile, int load, uint32_t* lows, uint32_t* highs) {
  const int64_t first = static_cast<int64_t>(load) * values;
  const int column = static_cast<int>(first % (work.channels * work.inner));
  int group = column / work.inner - tile.first_group;
  int left = work.inner - column % work.inner;
  Keys keys = kEmptyKeys;
  for (int i = 0; i < values; ++i) {
    keys = merge(keys, keys_at(found, i));
    if (--left == 0 || i + 1 == values) {
      merge_atomically(keys, &lows[group], &highs[group]);
      keys = kEmptyKeys;
      left = work.inner;
      group = group + 1 == tile.groups ? 0 : group + 1;
    }
  }
}

// The tile's groups, whose keys the block has, into the state; by the last block of a tile.
PYOBS_DEVICE void fold_tile(const DeviceMinmax& state, const ColumnsWork& work, int64_t first,
                            int groups, unsigned* finished, const uint32_t* lows,
                            const uint32_t* highs) {
  const int thread = static_cast<int>(threadIdx.x);
  const bool shared = work.splits > 1;
  for (int i = thread; shared && i < groups; i += kThreads) {
    merge_atomically({lows[i], highs[i]}, &state.low_keys[first + i], &state.high_keys[first + i]);
  }
  if (shared && !is_last_block(finished, work.splits)) {
    return;
  }
  for (int i = thread; i < groups; i += kThreads) {
    fold_into(state, first + i, shared ? shared_keys(state, first + i) : Keys{lows[i], highs[i]});
  }
}

template <class T, int values>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    columns_kernel(const T* __restrict__ x, const __grid_constant__ ColumnsWork work,
                   const __grid_constant__ DeviceLayout layout,
                   const __grid_constant__ DeviceMinmax state) {
  __shared__ uint32_t lows[kThreads * values], highs[kThreads * values];  // keys of the tile
  if (is_off(state.enabled)) {
    return;
  }
  const unsigned tasks = static_cast<unsigned>(work.pieces.kept) * work.tiles * work.splits;
  Found<T, values> found;
  found.nonfinite = 0;
  for (unsigned task = blockIdx.x; task < tasks; task += gridDim.x) {
    const Tile tile = tile_of(work, task);
    for (int i = static_cast<int>(threadIdx.x); i < tile.groups; i += kThreads) {
      lows[i] = highs[i] = kEmptyKey;
    }
    __syncthreads();
    const int row = static_cast<int>(threadIdx.x) / work.tile;
    const int load = tile.first_load + static_cast<int>(threadIdx.x) % work.tile;
    const bool has_load = row < work.abreast && load < work.period;
    clear_extremes(&found);
    for (int64_t piece = 0; piece < work.pieces.reduced; ++piece) {
      const int64_t start = row_start(layout, work.pieces, tile.set, piece * work.pieces.outer);
      if (has_load) {
        take_column(x, layout, work, start, load, tile.split * work.abreast + row, state.ignore,
                    &found);
      }
      if (tile.split == 0 && work.tail > 0) {
        const T* tail = x + start + work.rows * work.period * values;
        found.nonfinite += merge_tail(tail, work, state.ignore, lows, highs);
      }
    }
    if (has_load) {
      merge_column(found, work, tile, load, lows, highs);
    }
    __syncthreads();
    fold_tile(state, work, set_start(layout, tile.set) + tile.first_group, tile.groups,
              &state.finished[task / work.splits], lows, highs);
    __syncthreads();  // the keys have been read; without it ptxas runs out of registers, too
  }
  add_nonfinite(state, layout.repeat, found.nonfinite);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Pieces pieces_of(const DeviceLayout& layout) {
  Pieces pieces = {1, 1, layout.piece / (layout.channels * layout.inner)};
  for (int i = 0; i < layout.over_count; ++i) {
    (layout.over_group[i] == 0 ? pieces.reduced : pieces.kept) *= layout.over_size[i];
  }
  return pieces;
}

// One call, and how many blocks it is worth.
struct Call {
  const CudaContext& cuda;
  const Tensor& x;
  DType dtype;
  DeviceLayout layout;
  DeviceMinmax state;
  Pieces pieces;

  int64_t bytes() const { return layout.numel * element_size(dtype); }
  // Blocks that share each of so many parts of the tensor: no more than are at work at once, or
  // so many more that it matters little when the last ones are few.
  unsigned splits(int64_t parts) const {
    constexpr int64_t kRounds = 4;
    const int64_t at_once = cuda.blocks(bytes(), kBlockBytes, kBlocksPerMultiprocessor);
    const int64_t wanted =
        kRounds * parts <= at_once ? at_once / parts : divide_up(kRounds * at_once, parts);
    const int64_t worth = bytes() / kBlockBytes / parts;
    return static_cast<unsigned>(std::max<int64_t>(1, std::min(wanted, worth)));
  }
};

// The least power of two in [least, most] that is at least so much, or the greatest.
int power_of_two(int64_t wanted, int least, int most) {
  int power = least;
  while (power < wanted && power < most) {
    power *= 2;
  }
  return power;
}

// Memory for keys of the ranges and counts of finished blocks, all zero.
DeviceScratch shared_state(const Call& call, int64_t parts, DeviceMinmax* state) {
  const int64_t groups = call.layout.groups;
  const int64_t bytes = (2 * groups + parts) * static_cast<int64_t>(sizeof(uint32_t));
  DeviceScratch scratch(call.x, bytes);
  state->low_keys = scratch.at<uint32_t>(0);
  state->high_keys = state->low_keys + groups;
  state->finished = state->high_keys + groups;
  call.cuda.zero(state->low_keys, bytes);
  return scratch;
}

template <class Kernel, class Work>
void launch_shared(const Call& call, const Kernel& kernel, const Work& work, int64_t parts,
                   unsigned splits, unsigned threads) {
  const unsigned blocks = call.cuda.blocks(parts * splits, 1, kTasksPerMultiprocessor);
  DeviceMinmax state = call.state;
  std::optional<DeviceScratch> scratch;
  if (splits > 1) {
    scratch.emplace(shared_state(call, parts, &state));
  }
  dispatch(call.dtype, call.x.const_data_ptr(), [&](const auto* x) {
    call.cuda.launch(kernel(x), blocks, threads, 0, x, work, call.layout, state);
  });
}

bool by_teams(const Call& call) {
  const int64_t groups = call.layout.groups;
  const bool many = groups > call.cuda.blocks(groups, 1, 2 * kBlocksPerMultiprocessor);
  return many && call.bytes() / groups <= kTeamBytes;
}

void launch_runs(const Call& call) {
  const int64_t groups = call.layout.groups;
  const int64_t group_loads = divide_up(call.bytes() / groups, 16);
  const int64_t row_loads = divide_up(call.layout.inner * element_size(call.dtype), 16);
  RunsWork work = {call.pieces, groups, 1, 1, 1};
  if (by_teams(call)) {
    work.lanes = power_of_two(divide_up(row_loads, kAhead), 1, kWarp);
    dispatch(call.dtype, call.x.const_data_ptr(), [&](const auto* x) {
      using T = typename Pointee<decltype(x)>::type;
      const unsigned blocks =
          call.cuda.blocks(groups * work.lanes, kThreads, kTasksPerMultiprocessor);
      call.cuda.launch(teams_kernel<T>, blocks, kThreads, 0, x, work, call.layout, call.state);
    });
    return;
  }
  const bool alone = groups == 1 && call.bytes() <= kAloneBytes;
  const unsigned splits = alone ? 1 : call.splits(groups);
  const int threads =
      power_of_two(divide_up(group_loads, kAhead), kWarp, alone ? kMostThreads : kThreads);
  const int64_t rows = call.pieces.reduced * call.pieces.outer;
  work.lanes = power_of_two(divide_up(row_loads, kAhead), 1, threads);
  work.row_splits =
      static_cast<unsigned>(std::min<int64_t>(splits, divide_up(rows, threads / work.lanes)));
  work.run_splits = static_cast<unsigned>(
      std::min<int64_t>(splits / work.row_splits, divide_up(row_loads, kAhead * threads)));
  while (work.lanes < threads && threads / work.lanes > divide_up(rows, work.row_splits)) {
    work.lanes *= 2;
  }
  const auto kernel = [](const auto* x) {
    return runs_kernel<typename Pointee<decltype(x)>::type>;
  };
  launch_shared(call, kernel, work, groups, work.row_splits * work.run_splits,
                static_cast<unsigned>(threads));
}

// Loads are of so many values.
ColumnsWork columns_work(const Call& call, int64_t values) {
  const int64_t inner = call.layout.inner, width = call.layout.channels * inner;
  const int64_t period = std::lcm(width, values) / values;
  const int64_t joined = period * values / width;          // rows that fill whole loads
  const int64_t grain = std::lcm(inner, values) / values;  // loads that fill whole groups
  ColumnsWork work = {};
  work.pieces = call.pieces;
  work.rows = call.pieces.outer / joined;
  work.period = static_cast<int>(period);
  work.channels = static_cast<int>(call.layout.channels);
  work.inner = static_cast<int>(inner);
  work.tail = static_cast<int>(call.pieces.outer % joined * width);
  int64_t tile = period;
  if (period > kThreads) {
    const int64_t tiles = divide_up(period, kThreads / grain * grain);
    tile = divide_up(divide_up(period, tiles), grain) * grain;
  }
  work.tiles = static_cast<int>(divide_up(period, tile));
  work.tile = static_cast<int>(tile);
  work.tile_groups = work.tiles == 1 ? work.channels : static_cast<int>(tile * values / inner);
  work.abreast = static_cast<int>(kThreads / tile);
  work.splits = static_cast<int>(std::min<int64_t>(call.splits(call.pieces.kept * work.tiles),
                                                   divide_up(work.rows, work.abreast)));
  return work;
}

// Whether 16-byte loads lie in the columns: the pieces are aligned, the rows either so too or few
// of them fill whole loads, and a tile can have whole groups.
bool loads_fit(const Call& call, int64_t values) {
  const DeviceLayout& layout = call.layout;
  const bool one_piece = call.pieces.kept * call.pieces.reduced == 1;
  const bool aligned = layout.dense && is_aligned(call.x.const_data_ptr()) &&
                       (one_piece || layout.piece % values == 0);
  const int64_t width = layout.channels * layout.inner;
  const int64_t period = std::lcm(width, values) / values;
  if (period <= kThreads) {
    return aligned && call.pieces.outer / (period * values / width) >= kLeastRows;
  }
  return aligned && width % values == 0 && std::lcm(layout.inner, values) / values <= kThreads;
}

void launch_columns(const Call& call, bool whole_loads) {
  const ColumnsWork work = columns_work(call, whole_loads ? 16 / element_size(call.dtype) : 1);
  const auto kernel = [&](const auto* x) {
    using T = typename Pointee<decltype(x)>::type;
    return whole_loads ? columns_kernel<T, Pack<T>::size> : columns_kernel<T, 1>;
  };
  launch_shared(call, kernel, work, work.pieces.kept * work.tiles, work.splits, kThreads);
}

void launch(const Call& call) {
  const DeviceLayout& layout = call.layout;
  const int64_t values = 16 / element_size(call.dtype);
  const int64_t piece_bytes = layout.piece * element_size(call.dtype);
  const bool narrow = layout.channels * layout.inner <= INT32_MAX / kThreads;
  if (layout.channels > 1 && narrow && call.pieces.outer >= kLeastRows &&
      piece_bytes >= kColumnBytes) {
    const bool whole_loads = loads_fit(call, values);
    // long rows too where their ends would be single values
    if (layout.inner < kShortRun || (whole_loads && layout.inner % values != 0)) {
      launch_columns(call, whole_loads);
      return;
    }
  }
  launch_runs(call);
}

}  // namespace

void minmax_on_device(const char* op, DType dtype, const Tensor& x, const Grouping& grouping,
                      const MinmaxArgs& args, const DeviceSwitch& enabled,
                      const DeviceQParams& qparams) {
  const CudaContext cuda(op, x);
  if (args.nonfinite == Nonfinite::raise) {
    check_finite_on_device(op, cuda, dtype, x, enabled);
  }
  const Walk walk(op, x, grouping);
  DeviceMinmax state = {};
  state.lows = mutable_data<float>(args.min_val);
  state.highs = mutable_data<float>(args.max_val);
  state.nonfinite_count = mutable_data<int64_t>(args.nonfinite_count);
  state.update = args.update;
  state.averaging_constant = args.averaging_constant;
  state.ignore = args.nonfinite == Nonfinite::ignore;
  state.enabled = enabled;
  state.qparams = qparams;
  launch({cuda, walk.x, dtype, walk.layout, state, pieces_of(walk.layout)});
}

namespace {

void minmax(const Tensor& x, const Tensor& min_val, const Tensor& max_val,
            const Tensor& nonfinite_count, std::optional<int64_t> axis, int64_t update,
            double averaging_constant, int64_t nonfinite, std::optional<Tensor> enabled,
            std::optional<std::vector<int64_t>> block_size) {
  const DType dtype = input_dtype(kOp, "x", x);
  const Grouping grouping = parse_grouping(kOp, x, axis, block_size);
  const MinmaxArgs args = parse_minmax(kOp, x, min_val, max_val, nonfinite_count, grouping, update,
                                       averaging_constant, nonfinite);
  const DeviceSwitch on = device_switch(kOp, "enabled", enabled, x);
  if (x.numel() > 0) {
    minmax_on_device(kOp, dtype, x, grouping, args, on, {});
  }
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CUDA, m) { m.impl("minmax", TORCH_BOX(&pyobserver::minmax)); }
