// CPU body of log_histogram, compiled once per instruction set.
//
// A block of values at a time: their columns are computed in vectors, and the least and the
// greatest key with them, then counted one by one. NaN and infinities show in those keys; a block
// that has some is computed again, by a longer formula.
#include "log_histogram.h"

#include "../../core/simd.h"

namespace pyobserver::PYOBS_ISA {
namespace {

constexpr int kBlock = 256;

// The columns of finite values, and their keys; of no use, as the keys then tell, where some value
// is not finite.
template <class T>
PYOBS_HD Keys finite_columns(const T* x, int n, const LogBins& bins, int32_t* columns) {
  Keys keys = no_keys();
  for (int i = 0; i < n; ++i) {
    const int32_t key = key_of(to_float(x[i]));
    keys = merge(keys, {key, key});
    columns[i] = finite_column(key, bins);
  }
  return keys;
}

// The columns of any values, and the keys of those that enter the range.
template <class T>
__attribute__((noinline)) Keys any_columns(const T* x, int n, const LogSink& sink,
                                           int32_t* columns) {
  const LogBins bins = sink.bins;  // a copy, which the stores cannot change
  const Entrance entrance = entrance_of(sink.propagate);
  Keys keys = no_keys();
  for (int i = 0; i < n; ++i) {
    const int32_t bits = static_cast<int32_t>(float_to_bits(to_float(x[i])));
    keys = merge(keys, keys_of(bits, entrance));
    columns[i] = column_of(bits, bins);
  }
  return keys;
}

// Types of 16 bits where columns have no more: up to so many mantissa bits.
constexpr int kNarrowMantissaBits = 7;

using Shorts = Vector<int16_t>;
using UnsignedShorts = Vector<uint16_t>;
constexpr int kShorts = kVectorBytes / 2;

template <class T>
struct ShortBins;

// The upper half of a float32, of which a negative key has ones in the lower half: with all seven
// bits kept, they round up to the next.
template <>
struct ShortBins<BFloat16> {
  static constexpr int16_t infinity = 0x7f80;
  uint16_t half, carry, first;
  int16_t shift;

  __attribute__((always_inline)) explicit ShortBins(const LogBins& bins)
      : half(static_cast<uint16_t>(bins.mantissa_bits < 7 ? 64 >> bins.mantissa_bits : 0)),
        carry(bins.mantissa_bits < 7 ? 0 : 1),
        first(static_cast<uint16_t>(bins.greatest + 1)),
        shift(static_cast<int16_t>(7 - bins.mantissa_bits)) {}

  __attribute__((always_inline)) UnsignedShorts columns(const UnsignedShorts&,
                                                        const UnsignedShorts& sign,
                                                        const UnsignedShorts& key,
                                                        UnsignedShorts*) const {
    const UnsignedShorts rounded = key + half + (sign & carry);
    return (UnsignedShorts)((Shorts)rounded >> shift) + first;
  }
};

// The exponent of a normal value is 112 less than that of its float32. Subnormal ones are told by
// `least`, the least magnitude less one, of which that of zero is the greatest.
template <>
struct ShortBins<Half> {
  static constexpr int16_t infinity = 0x7c00;
  uint16_t half, rebias, first, shift;

  __attribute__((always_inline)) explicit ShortBins(const LogBins& bins)
      : half(static_cast<uint16_t>(512 >> bins.mantissa_bits)),
        rebias(static_cast<uint16_t>(112 << bins.mantissa_bits)),
        first(static_cast<uint16_t>(bins.greatest + 1)),
        shift(static_cast<uint16_t>(10 - bins.mantissa_bits)) {}

  __attribute__((always_inline)) UnsignedShorts columns(const UnsignedShorts& bits,
                                                        const UnsignedShorts& sign,
                                                        const UnsignedShorts&,
                                                        UnsignedShorts* least) const {
    const UnsignedShorts magnitude = bits & uint16_t{0x7fff};
    *least = minimum(*least, magnitude - uint16_t{1});
    const UnsignedShorts nearest = ((magnitude + half) >> shift) + rebias;
    const UnsignedShorts bin = nearest & (UnsignedShorts)(magnitude != uint16_t{0});
    return ((bin ^ sign) - sign) + first;
  }
};

template <class T>
PYOBS_HD int32_t key_of_short(int16_t key) {
  const int16_t bits = static_cast<int16_t>(key ^ ((key >> 15) & 0x7fff));
  T value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return key_of(to_float(value));
}

// As above for n values, a multiple of kShorts; false where some value is not finite or subnormal.
template <class T>
PYOBS_HD bool short_columns(const T* x, int n, const ShortBins<T>& bins, uint16_t* columns,
                            Keys* keys) {
  Shorts low = Shorts{} + int16_t{0x7fff}, high = ~low;
  UnsignedShorts least = ~UnsignedShorts{};
  for (int i = 0; i < n; i += kShorts) {
    const Shorts bits = load_vector<int16_t>(x + i);
    const Shorts sign = bits >> int16_t{15};
    const Shorts key = bits ^ (sign & int16_t{0x7fff});
    low = minimum(low, key);
    high = maximum(high, key);
    const UnsignedShorts found =
        bins.columns((UnsignedShorts)bits, (UnsignedShorts)sign, (UnsignedShorts)key, &least);
    __builtin_memcpy(columns + i, &found, sizeof(found));
  }
  const auto least_of = [](const auto& a, const auto& b) { return minimum(a, b); };
  const auto most_of = [](const auto& a, const auto& b) { return maximum(a, b); };
  const int16_t lowest = fold_lanes<int16_t>(low, least_of);
  const int16_t highest = fold_lanes<int16_t>(high, most_of);
  *keys = {key_of_short<T>(lowest), key_of_short<T>(highest)};
  return (lowest >= -ShortBins<T>::infinity) & (highest < ShortBins<T>::infinity) &
         (fold_lanes<uint16_t>(least, least_of) >= 0x3ff);
}

// A row of the state. Where half of a block are in one column, as the zeros after a ReLU, each
// would wait for the one before: they are counted in the columns next to each other instead, lane
// by lane, and then moved.
struct StateRow {
  int64_t *counts, size, repeat;

  template <class Column>
  __attribute__((always_inline)) void add(Column* columns, int n) const {
    if (n == kBlock) {
      spread_common(columns);
    }
    for (int i = 0; i < n; ++i) {
      counts[columns[i]] += repeat;
    }
  }

  template <class Column>
  __attribute__((always_inline)) void spread_common(Column* columns) const {
    constexpr int kLanes = kVectorBytes / sizeof(Column);
    using Lanes = Vector<Column>;
    const Column common = columns[100] == columns[201] ? columns[100] : columns[17];
    Lanes number = {};
    for (int i = 0; i < kBlock; i += kLanes) {
      number -= (Lanes)(load_vector<Column>(columns + i) == common);
    }
    const auto sum = [](const auto& a, const auto& b) { return a + b; };
    const int total = fold_lanes<Column>(number, sum);
    if (total < kBlock / 2) {
      return;
    }
    const int64_t first = minimum(static_cast<int64_t>(common), size - kLanes);
    Lanes places = {};
    for (int lane = 0; lane < kLanes; ++lane) {
      places[lane] = static_cast<Column>(first + lane);
      counts[first + lane] -= repeat * number[lane];
    }
    counts[common] += repeat * total;
    for (int i = 0; i < kBlock; i += kLanes) {
      const Lanes before = load_vector<Column>(columns + i);
      const Lanes after = before == common ? places : before;
      __builtin_memcpy(columns + i, &after, sizeof(after));
    }
  }
};

// Rows of a part.
struct PartRow {
  uint32_t* counts;
  int64_t spread;

  template <class Column>
  __attribute__((always_inline)) void add(Column* columns, int n) const {
    int i = 0;
    for (; i + kCopies <= n; i += kCopies) {
      for (int copy = 0; copy < kCopies; ++copy) {
        ++counts[columns[i + copy] + copy * spread];
      }
    }
    for (; i < n; ++i) {
      ++counts[columns[i]];
    }
  }
};

// full: n is kBlock, which the loops then know.
template <bool full, class T, class Row>
PYOBS_HD Keys count_block(const T* x, int n, const LogSink& sink, const LogBins& bins,
                          const Row& row) {
  int32_t columns[kBlock];
  Keys keys = finite_columns(x, full ? kBlock : n, bins, columns);
  if (__builtin_expect(!are_finite(keys), 0)) {
    keys = any_columns(x, n, sink, columns);
  }
  row.add(columns, full ? kBlock : n);
  return keys;
}

template <bool full, class T, class Row>
PYOBS_HD Keys count_short_block(const T* x, int n, const LogSink& sink, const ShortBins<T>& bins,
                                const Row& row) {
  uint16_t columns[kBlock];
  T padded[kBlock];
  const T* from = x;
  int count = kBlock;
  if (!full) {
    count = (n + kShorts - 1) / kShorts * kShorts;
    __builtin_memcpy(padded, x, n * sizeof(T));
    for (int i = n; i < count; ++i) {
      padded[i] = x[0];  // changes no extreme
    }
    from = padded;
  }
  Keys keys;
  if (__builtin_expect(short_columns(from, count, bins, columns, &keys), 1)) {
    row.add(columns, full ? kBlock : n);
  } else {
    int32_t wide[kBlock];
    keys = any_columns(x, n, sink, wide);
    row.add(wide, full ? kBlock : n);
  }
  return keys;
}

// The counts lie scattered, and keep the hardware from seeing that x is read in order.
template <class T>
PYOBS_HD void prefetch_block(const T* x) {
  constexpr int64_t kAhead = 4096;  // bytes
  const char* from = reinterpret_cast<const char*>(x) + kAhead;
  for (int64_t line = 0; line < kBlock * static_cast<int64_t>(sizeof(T)); line += 64) {
    __builtin_prefetch(from + line);
  }
}

// All of one channel.
template <class T, class Row>
void count_run(const T* x, int64_t n, const LogSink& sink, Row row, Keys* keys) {
  const LogBins bins = sink.bins;
  Keys found = *keys;
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    prefetch_block(x + i);
    found = merge(found, count_block<true>(x + i, kBlock, sink, bins, row));
  }
  if (i < n) {
    found = merge(found, count_block<false>(x + i, static_cast<int>(n - i), sink, bins, row));
  }
  *keys = found;
}

template <class T, class Row>
void count_short_run(const T* x, int64_t n, const LogSink& sink, Row row, Keys* keys) {
  const ShortBins<T> bins(sink.bins);
  Keys found = *keys;
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    prefetch_block(x + i);
    found = merge(found, count_short_block<true>(x + i, kBlock, sink, bins, row));
  }
  if (i < n) {
    found = merge(found, count_short_block<false>(x + i, static_cast<int>(n - i), sink, bins, row));
  }
  *keys = found;
}

template <class T, class Row>
PYOBS_HD void count_any_run(const T* x, int64_t n, const LogSink& sink, const Row& row,
                            Keys* keys) {
  if constexpr (sizeof(T) == 2) {
    if (sink.bins.mantissa_bits <= kNarrowMantissaBits) {
      count_short_run(x, n, sink, row, keys);
      return;
    }
  }
  count_run(x, n, sink, row, keys);
}

template <class T>
void count_channel(const T* x, int64_t n, int64_t channel, const LogSink& sink) {
  const int64_t at = channel * columns_of(sink.bins);
  Keys keys = {sink.lows[channel], sink.highs[channel]};
  if (sink.part == nullptr) {
    count_any_run(x, n, sink, StateRow{sink.state + at, columns_of(sink.bins), sink.repeat}, &keys);
  } else {
    count_any_run(x, n, sink, PartRow{sink.part + at, sink.spread}, &keys);
  }
  sink.lows[channel] = keys.low;
  sink.highs[channel] = keys.high;
}

// Channel after channel, from element `position` of the period on.
template <class T>
void count_runs(const T* x, int64_t n, int64_t position, const LogSink& sink) {
  const int64_t period = sink.channels * sink.inner;
  for (int64_t start = -position; start < n; start += period) {
    const int64_t end = minimum(start + sink.last * sink.inner, n);
    int64_t i = maximum(start + sink.first * sink.inner, int64_t{0});
    for (int64_t channel = (i - start) / sink.inner; i < end; ++channel) {
      const int64_t stop = minimum(start + (channel + 1) * sink.inner, end);
      count_channel(x + i, stop - i, channel, sink);
      i = stop;
    }
  }
}

// Short runs that repeat, as the columns of a matrix: those of a cache line are copied, some rows
// at a time, each to a row of its own, so that a channel has many values at once.
template <class T>
void count_matrix(const T* x, int64_t rows, const LogSink& sink) {
  constexpr int64_t kWide = 64 / sizeof(T);
  const int64_t width = sink.channels * sink.inner;
  T turned[kWide * kBlock];
  for (int64_t top = 0; top < rows; top += kBlock) {
    const int64_t height = minimum(rows - top, int64_t{kBlock});
    const int64_t end = sink.last * sink.inner;
    for (int64_t left = sink.first * sink.inner; left < end; left += kWide) {
      const int64_t count = minimum(end - left, kWide);
      for (int64_t row = 0; row < height; ++row) {
        const T* from = x + (top + row) * width + left;
        for (int64_t i = 0; i < count; ++i) {
          turned[i * height + row] = from[i];
        }
      }
      for (int64_t i = 0; i < count;) {
        const int64_t channel = (left + i) / sink.inner;
        const int64_t stop = minimum((channel + 1) * sink.inner - left, count);
        count_channel(turned + i * height, (stop - i) * height, channel, sink);
        i = stop;
      }
    }
  }
}

template <class T>
void count_span(const T* x, int64_t n, int64_t offset, const LogSink& sink) {
  if (sink.channels == 1) {
    count_channel(x, n, 0, sink);
    return;
  }
  constexpr int64_t kShortRun = 64;
  constexpr int64_t kFewRows = 8;
  const int64_t period = sink.channels * sink.inner;
  const int64_t position = offset % period;
  const int64_t head = minimum(n, position == 0 ? 0 : period - position);
  const int64_t rows = (n - head) / period;
  if (sink.inner >= kShortRun || rows < kFewRows) {
    count_runs(x, n, position, sink);
    return;
  }
  const int64_t tail = head + rows * period;
  count_runs(x, head, position, sink);
  count_matrix(x + head, rows, sink);
  count_runs(x + tail, n - tail, 0, sink);
}

void count(DType dtype, const void* x, int64_t n, int64_t offset, const LogSink& sink) {
  dispatch(dtype, x, [&](const auto* typed) { count_span(typed, n, offset, sink); });
}

void add(int64_t* state, const uint32_t* added, int64_t rows, int64_t stride, int64_t columns,
         int64_t repeat) {
  constexpr int64_t kColumns = 64;
  for (int64_t start = 0; start < columns; start += kColumns) {
    const int64_t count = minimum(columns - start, kColumns);
    int64_t sums[kColumns] = {};
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < count; ++i) {
        sums[i] += static_cast<int64_t>(added[row * stride + start + i]);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      state[start + i] += repeat * sums[i];
    }
  }
}

}  // namespace

extern const LogHistogramTable log_histogram_table = {count, add};

}  // namespace pyobserver::PYOBS_ISA
