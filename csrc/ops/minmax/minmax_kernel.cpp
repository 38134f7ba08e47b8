// CPU body of minmax, compiled once per instruction set.
//
// Floats are compared by their bits. As signed integers the positive ones are in order, as unsigned
// ones the positive and the negative ones each are, the latter from small to large: so three
// integer maxima and minima hold the least and the greatest float, and show NaN and infinities too,
// whose bits lie beyond those of finite values. A stretch that has some is gone over once more.
#include "minmax.h"

#include "../../core/simd.h"

namespace pyobserver::PYOBS_ISA {
namespace {

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using Unsigned = uint32_t;
  using Signed = int32_t;
  static constexpr Unsigned infinity = 0x7f800000u;
};
template <>
struct BitsOf<Half> {
  using Unsigned = uint16_t;
  using Signed = int16_t;
  static constexpr Unsigned infinity = 0x7c00u;
};
template <>
struct BitsOf<BFloat16> {
  using Unsigned = uint16_t;
  using Signed = int16_t;
  static constexpr Unsigned infinity = 0x7f80u;
};

template <class T>
PYOBS_HD float value_of_bits(typename BitsOf<T>::Unsigned bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return to_float(value);
}

// The three extremes, of one value or of a vector of them.
template <class SignedValue, class UnsignedValue>
struct Extremes {
  SignedValue most_signed;
  UnsignedValue most, least;

  void start(const UnsignedValue& value) {
    most_signed = (SignedValue)value;
    most = least = value;
  }
  void take(const UnsignedValue& value) {
    most_signed = maximum((SignedValue)value, most_signed);
    most = maximum(value, most);
    least = minimum(value, least);
  }
  void merge(const Extremes& other) {
    most_signed = maximum(other.most_signed, most_signed);
    most = maximum(other.most, most);
    least = minimum(other.least, least);
  }
};

template <class T>
using BitsExtremes = Extremes<typename BitsOf<T>::Signed, typename BitsOf<T>::Unsigned>;
template <class T>
using VectorExtremes =
    Extremes<Vector<typename BitsOf<T>::Signed>, Vector<typename BitsOf<T>::Unsigned>>;

// False where there are NaN or infinities, and the range is then of no use.
template <class T>
PYOBS_HD bool finite_range(const BitsExtremes<T>& found, Range* range) {
  using Unsigned = typename BitsOf<T>::Unsigned;
  constexpr Unsigned kInfinity = BitsOf<T>::infinity;
  constexpr Unsigned kSign = static_cast<Unsigned>(Unsigned{1} << (8 * sizeof(Unsigned) - 1));
  const bool some_negative = found.most >= kSign;
  const bool some_positive = found.most_signed >= 0;
  range->low = value_of_bits<T>(some_negative ? found.most : found.least);
  range->high =
      value_of_bits<T>(some_positive ? static_cast<Unsigned>(found.most_signed) : found.least);
  return (found.most_signed < static_cast<typename BitsOf<T>::Signed>(kInfinity)) &
         (found.most < static_cast<Unsigned>(kInfinity | kSign));
}

// n >= vectors * lanes; the last vectors overlap those before, which changes no extreme.
template <class T, int vectors>
PYOBS_HD BitsExtremes<T> extremes_of_run(const T* x, int64_t n) {
  using Unsigned = typename BitsOf<T>::Unsigned;
  using Signed = typename BitsOf<T>::Signed;
  constexpr int64_t kLanes = kVectorBytes / sizeof(T);
  constexpr int64_t kStep = vectors * kLanes;
  VectorExtremes<T> found[vectors];
  for (int v = 0; v < vectors; ++v) {
    found[v].start(load_vector<Unsigned>(x + v * kLanes));
  }
  int64_t i = kStep;
  for (; i + kStep <= n; i += kStep) {
    for (int v = 0; v < vectors; ++v) {
      found[v].take(load_vector<Unsigned>(x + i + v * kLanes));
    }
  }
  if (i < n) {
    for (int v = 0; v < vectors; ++v) {
      found[v].take(load_vector<Unsigned>(x + n - kStep + v * kLanes));
    }
  }
  for (int v = 1; v < vectors; ++v) {
    found[0].merge(found[v]);
  }
  const auto most_of = [](const auto& a, const auto& b) { return maximum(a, b); };
  const auto least_of = [](const auto& a, const auto& b) { return minimum(a, b); };
  return {fold_lanes<Signed>(found[0].most_signed, most_of),
          fold_lanes<Unsigned>(found[0].most, most_of),
          fold_lanes<Unsigned>(found[0].least, least_of)};
}

template <class T>
constexpr int64_t kLong = 16 * kVectorBytes / static_cast<int64_t>(sizeof(T));

// 1 <= n < kLong
template <class T>
PYOBS_HD BitsExtremes<T> extremes_of_short(const T* x, int64_t n) {
  constexpr int64_t kLanes = kVectorBytes / sizeof(T);
  if (n >= 2 * kLanes) {
    return extremes_of_run<T, 2>(x, n);
  }
  if (n >= kLanes) {
    return extremes_of_run<T, 1>(x, n);
  }
  BitsExtremes<T> found;
  typename BitsOf<T>::Unsigned bits;
  __builtin_memcpy(&bits, x, sizeof(bits));
  found.start(bits);
  for (int64_t i = 1; i < n; ++i) {
    __builtin_memcpy(&bits, x + i, sizeof(bits));
    found.take(bits);
  }
  return found;
}

template <bool finite_only>
PYOBS_HD void merge_value(float value, float* low, float* high, int32_t* nonfinite) {
  const bool finite = is_finite(value);
  *nonfinite += !finite;
  if (finite_only) {
    const float up = finite ? value : __builtin_huge_valf();
    const float down = finite ? value : -__builtin_huge_valf();
    *low = up < *low ? up : *low;
    *high = down > *high ? down : *high;
  } else {
    *low = (value < *low) | (value != value) ? value : *low;
    *high = (value > *high) | (value != value) ? value : *high;
  }
}

// Values that may not be finite; returns how many are not.
template <class T, bool finite_only>
__attribute__((noinline)) int64_t merge_values(const T* x, int64_t n, Range* range) {
  constexpr int kLanes = 16;
  float low[kLanes], high[kLanes];
  int32_t nonfinite[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    low[lane] = range->low;
    high[lane] = range->high;
    nonfinite[lane] = 0;
  }
  for (int64_t whole = n / kLanes; whole > 0; --whole) {
    for (int lane = 0; lane < kLanes; ++lane) {
      merge_value<finite_only>(to_float(x[lane]), &low[lane], &high[lane], &nonfinite[lane]);
    }
    x += kLanes;
  }
  for (int lane = 0; lane < static_cast<int>(n % kLanes); ++lane) {
    merge_value<finite_only>(to_float(x[lane]), &low[lane], &high[lane], &nonfinite[lane]);
  }
  int64_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    *range = merge(*range, {low[lane], high[lane]});
    total += nonfinite[lane];
  }
  return total;
}

template <class T>
PYOBS_HD int64_t merge_found(const BitsExtremes<T>& found, const T* x, int64_t n, bool finite_only,
                             Range* range) {
  Range finite;
  if (finite_range<T>(found, &finite)) {
    *range = merge(*range, finite);
    return 0;
  }
  return finite_only ? merge_values<T, true>(x, n, range) : merge_values<T, false>(x, n, range);
}

// Apart from the short runs, whose loop has no registers to spare for it.
template <class T>
__attribute__((noinline)) int64_t merge_long(const T* x, int64_t n, bool finite_only,
                                             Range* range) {
  constexpr int64_t kStretch = 65536 / sizeof(T);  // stays in the cache for a second look
  int64_t nonfinite = 0;
  while (n >= kLong<T>) {
    const int64_t count = minimum(n, kStretch);
    nonfinite += merge_found(extremes_of_run<T, 4>(x, count), x, count, finite_only, range);
    x += count;
    n -= count;
  }
  if (n > 0) {
    nonfinite += merge_found(extremes_of_short(x, n), x, n, finite_only, range);
  }
  return nonfinite;
}

struct Channels {
  int64_t count, inner;
  bool finite_only;
  float *lows, *highs;
};

template <class T>
PYOBS_HD int64_t merge_channel(const T* x, int64_t n, const Channels& channels, int64_t channel) {
  Range range = {channels.lows[channel], channels.highs[channel]};
  const int64_t nonfinite =
      n >= kLong<T> ? merge_long(x, n, channels.finite_only, &range)
                    : merge_found(extremes_of_short(x, n), x, n, channels.finite_only, &range);
  channels.lows[channel] = range.low;
  channels.highs[channel] = range.high;
  return nonfinite;
}

// Channel after channel, from element `position` of the period on.
template <class T>
int64_t merge_runs(const T* x, int64_t n, int64_t position, const Channels& channels) {
  int64_t channel = position / channels.inner;
  int64_t left = channels.inner - position % channels.inner;
  int64_t nonfinite = 0;
  while (n > 0) {
    const int64_t count = minimum(left, n);
    nonfinite += merge_channel(x, count, channels, channel);
    x += count;
    n -= count;
    left = channels.inner;
    channel = channel + 1 == channels.count ? 0 : channel + 1;
  }
  return nonfinite;
}

// Short runs that repeat, as the columns of a matrix: a few rows at a time are swept from left to
// right, so that memory is read in order, and what they have is taken into the columns' extremes.
constexpr int kRows = 8;
constexpr int64_t kAhead = 8192;        // bytes
constexpr int64_t kMostColumns = 1024;  // of one sweep; a wider period takes several
constexpr int64_t kLeastColumns = 128;  // a narrower one is taken several times in a row

template <class T>
struct Columns {
  static constexpr int64_t kLanes = kVectorBytes / sizeof(T);
  typename BitsOf<T>::Signed most_signed[kMostColumns];
  typename BitsOf<T>::Unsigned most[kMostColumns], least[kMostColumns];

  void load(int64_t at, VectorExtremes<T>* found) const {
    found->most_signed = load_vector<typename BitsOf<T>::Signed>(most_signed + at);
    found->most = load_vector<typename BitsOf<T>::Unsigned>(most + at);
    found->least = load_vector<typename BitsOf<T>::Unsigned>(least + at);
  }
  void store(int64_t at, const VectorExtremes<T>& found) {
    __builtin_memcpy(most_signed + at, &found.most_signed, kVectorBytes);
    __builtin_memcpy(most + at, &found.most, kVectorBytes);
    __builtin_memcpy(least + at, &found.least, kVectorBytes);
  }
};

// ahead: what will be read later, and is asked for in the order of memory, which the reads of
// several rows at a time do not keep. May be null.
template <class T, int rows>
PYOBS_HD void sweep(const T* x, int64_t width, int64_t count, bool is_first, const char* ahead,
                    Columns<T>* columns) {
  using Unsigned = typename BitsOf<T>::Unsigned;
  constexpr int64_t kLanes = Columns<T>::kLanes;
  for (int64_t done = 0; done < count; done += kLanes) {
    const int64_t at = minimum(done, count - kLanes);  // overlapping changes no extreme
    if (ahead != nullptr) {
      for (int64_t line = 0; line < rows * kVectorBytes; line += 64) {
        __builtin_prefetch(ahead + done * rows * sizeof(T) + line);
      }
    }
    VectorExtremes<T> found;
    found.start(load_vector<Unsigned>(x + at));
    for (int row = 1; row < rows; ++row) {
      found.take(load_vector<Unsigned>(x + row * width + at));
    }
    if (!is_first) {
      VectorExtremes<T> before;
      columns->load(at, &before);
      found.merge(before);
    }
    columns->store(at, found);
  }
}

// Calls body(begin, end, &range) for the columns of each channel in [first, first + count), counted
// from the first.
template <class Body>
PYOBS_HD void for_each_channel(int64_t first, int64_t count, const Channels& channels,
                               const Body& body) {
  int64_t channel = first % (channels.count * channels.inner) / channels.inner;
  int64_t left = channels.inner - first % channels.inner;
  for (int64_t begin = 0; begin < count;) {
    const int64_t end = minimum(begin + left, count);
    Range range = {channels.lows[channel], channels.highs[channel]};
    body(begin, end, &range);
    channels.lows[channel] = range.low;
    channels.highs[channel] = range.high;
    begin = end;
    left = channels.inner;
    channel = channel + 1 == channels.count ? 0 : channel + 1;
  }
}

// Columns whose values may not be finite; returns how many are not.
template <class T, bool finite_only>
__attribute__((noinline)) int64_t merge_column_values(const T* x, int64_t rows, int64_t width,
                                                      int64_t first, int64_t count,
                                                      const Channels& channels) {
  float low[kMostColumns], high[kMostColumns];
  for (int64_t i = 0; i < count; ++i) {
    low[i] = empty_range().low;
    high[i] = empty_range().high;
  }
  int64_t nonfinite = 0;
  for (int64_t row = 0; row < rows; ++row) {
    int32_t of_row = 0;
    for (int64_t i = 0; i < count; ++i) {
      merge_value<finite_only>(to_float(x[row * width + first + i]), &low[i], &high[i], &of_row);
    }
    nonfinite += of_row;
  }
  for_each_channel(first, count, channels, [&](int64_t begin, int64_t end, Range* range) {
    for (int64_t i = begin; i < end; ++i) {
      *range = merge(*range, {low[i], high[i]});
    }
  });
  return nonfinite;
}

// The columns [first, first + count) of a matrix of `width` columns.
template <class T>
int64_t merge_column_group(const T* x, int64_t rows, int64_t width, int64_t first, int64_t count,
                           const Channels& channels) {
  Columns<T> columns;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    const T* from = x + row * width + first;
    const char* ahead = count == width ? reinterpret_cast<const char*>(from) + kAhead : nullptr;
    sweep<T, kRows>(from, width, count, row == 0, ahead, &columns);
  }
  for (; row < rows; ++row) {
    sweep<T, 1>(x + row * width + first, width, count, row == 0, nullptr, &columns);
  }
  bool all_finite = true;
  for_each_channel(first, count, channels, [&](int64_t begin, int64_t end, Range* range) {
    BitsExtremes<T> extremes = {columns.most_signed[begin], columns.most[begin],
                                columns.least[begin]};
    for (int64_t i = begin + 1; i < end; ++i) {
      extremes.merge({columns.most_signed[i], columns.most[i], columns.least[i]});
    }
    Range found;
    if (finite_range<T>(extremes, &found)) {
      *range = merge(*range, found);
    } else {
      all_finite = false;
    }
  });
  if (all_finite) {
    return 0;
  }
  return channels.finite_only
             ? merge_column_values<T, true>(x, rows, width, first, count, channels)
             : merge_column_values<T, false>(x, rows, width, first, count, channels);
}

template <class T>
int64_t merge_columns(const T* x, int64_t rows, const Channels& channels) {
  const int64_t period = channels.count * channels.inner;
  const int64_t repeats = (kLeastColumns + period - 1) / period;
  const int64_t width = repeats * period;
  const int64_t wide_rows = rows / repeats;
  int64_t nonfinite = merge_runs(x + wide_rows * width, (rows % repeats) * period, 0, channels);
  for (int64_t first = 0; wide_rows > 0 && first < width;) {
    int64_t count = minimum(kMostColumns, width - first);
    const int64_t rest = width - first - count;
    count -= rest > 0 && rest < kLeastColumns ? kLeastColumns : 0;  // leaving enough for a vector
    nonfinite += merge_column_group(x, wide_rows, width, first, count, channels);
    first += count;
  }
  return nonfinite;
}

template <class T>
int64_t merge_groups(const T* x, int64_t n, int64_t offset, const Channels& channels) {
  if (channels.count == 1) {
    return merge_channel(x, n, channels, 0);
  }
  constexpr int64_t kShortRun = 64;
  constexpr int64_t kFewRows = 8;
  const int64_t period = channels.count * channels.inner;
  const int64_t position = offset % period;
  const int64_t head = minimum(n, position == 0 ? 0 : period - position);
  const int64_t rows = (n - head) / period;
  if (channels.inner >= kShortRun || rows < kFewRows) {
    return merge_runs(x, n, position, channels);
  }
  const int64_t tail = head + rows * period;
  return merge_runs(x, head, position, channels) + merge_columns(x + head, rows, channels) +
         merge_runs(x + tail, n - tail, 0, channels);
}

// float64 is taken as float32, a piece at a time.
int64_t merge_groups(const double* x, int64_t n, int64_t offset, const Channels& channels) {
  constexpr int64_t kNarrowed = 2048;
  float narrowed[kNarrowed];
  int64_t nonfinite = 0;
  for (int64_t start = 0; start < n; start += kNarrowed) {
    const int64_t count = minimum(n - start, kNarrowed);
    for (int64_t i = 0; i < count; ++i) {
      narrowed[i] = static_cast<float>(x[start + i]);
    }
    nonfinite += merge_groups(narrowed, count, offset + start, channels);
  }
  return nonfinite;
}

int64_t groups(DType dtype, const void* x, int64_t n, int64_t offset, int64_t channels,
               int64_t inner, bool finite_only, float* lows, float* highs) {
  return dispatch(dtype, x, [&](const auto* typed) {
    return merge_groups(typed, n, offset, Channels{channels, inner, finite_only, lows, highs});
  });
}

}  // namespace

extern const MinmaxTable minmax_table = {groups};

}  // namespace pyobserver::PYOBS_ISA
