// log_histogram: bins by the sign, the exponent and the first k bits of the mantissa of a float32.
//
//   key = bits ^ ((bits >> 31) & 0x7fffffff)        of the value's bits as int32: in its order
//   bin = (key + (1 << (22 - k))) >> (23 - k)       its magnitude rounded half away from zero
//
// bin(-x) = -bin(x), and zeros share bin 0. The finite bins are -(255 << k) to 255 << k. A row of
// counts has 2 * (255 << k) + 4 columns: -inf, the finite bins in order, +inf, NaN. FLT_MAX and
// infinity, whose keys would give one bin, are so told apart.
//
// Counts are integers and keys have an order of their own, so the result does not depend on how the
// work is cut.
#pragma once

#include "../../core/cpu_isa.h"
#include "../../core/dtype.h"
#include "../minmax/minmax.h"

namespace pyobserver {

constexpr int kMostMantissaBits = 10;
constexpr int32_t kInfinityKey = 0x7f800000;
constexpr int32_t kMostKey = 0x7fffffff;  // as greatest and with kLeastKey as least: NaN
constexpr int32_t kLeastKey = -kMostKey - 1;

struct LogBins {
  int32_t greatest;  // finite bin
  int32_t half, shift;
  int mantissa_bits;
};

PYOBS_HD LogBins log_bins(int mantissa_bits) {
  return {255 << mantissa_bits, 1 << (22 - mantissa_bits), 23 - mantissa_bits, mantissa_bits};
}

PYOBS_HD int64_t columns_of(const LogBins& bins) { return 2 * int64_t{bins.greatest} + 4; }

// Its own inverse.
PYOBS_HD int32_t key_of_bits(int32_t bits) { return bits ^ ((bits >> 31) & kMostKey); }

PYOBS_HD int32_t key_of(float value) {
  return key_of_bits(static_cast<int32_t>(float_to_bits(value)));
}

PYOBS_HD float value_of_key(int32_t key) {
  return bits_to_float(static_cast<uint32_t>(key_of_bits(key)));
}

// Of a finite value; of any other it is defined, and of no use.
PYOBS_HD int32_t finite_column(int32_t key, const LogBins& bins) {
  const uint32_t nearest = static_cast<uint32_t>(key) + static_cast<uint32_t>(bins.half);
  return (static_cast<int32_t>(nearest) >> bins.shift) + (bins.greatest + 1);
}

// Of any value, given its bits.
PYOBS_HD int32_t column_of(int32_t bits, const LogBins& bins) {
  const int32_t magnitude = bits & kMostKey;
  const int32_t column = finite_column(key_of_bits(bits), bins);
  const int32_t farther = (bits >> 31) | 1;  // an infinity lies beyond the last finite bin
  const int32_t infinite_or_not = column + (magnitude == kInfinityKey ? farther : 0);
  return magnitude > kInfinityKey ? 2 * bins.greatest + 3 : infinite_or_not;
}

// The keys of the least and the greatest value; where there is none, low is above high.
struct Keys {
  int32_t low, high;
};

PYOBS_HD Keys no_keys() { return {kMostKey, kLeastKey}; }

PYOBS_HD Keys merge(Keys a, Keys b) {
  return {b.low < a.low ? b.low : a.low, b.high > a.high ? b.high : a.high};
}

PYOBS_HD bool are_finite(Keys keys) {
  return (keys.low >= -kInfinityKey) & (keys.high < kInfinityKey);
}

// Which values enter a range, by the bits of their magnitude, and what the others add to it.
struct Entrance {
  int32_t most;
  Keys beyond;
};

PYOBS_HD Entrance entrance_of(bool propagate) {
  return propagate ? Entrance{kInfinityKey, {kLeastKey, kMostKey}}
                   : Entrance{kInfinityKey - 1, no_keys()};
}

// What a value of these bits adds to a range.
PYOBS_HD Keys keys_of(int32_t bits, const Entrance& entrance) {
  const int32_t key = key_of_bits(bits);
  const bool enters = (bits & kMostKey) <= entrance.most;
  return {enters ? key : entrance.beyond.low, enters ? key : entrance.beyond.high};
}

PYOBS_HD Range range_of(Keys keys) {
  return keys.low > keys.high ? empty_range()
                              : canonical(Range{value_of_key(keys.low), value_of_key(keys.high)});
}

// Where the values of a span go. Element i of its piece belongs to the channel
// (i / inner) % channels, of which those in [first, last) are counted.
struct LogSink {
  LogBins bins;
  bool propagate;  // NaN and infinities enter the keys
  int64_t channels, inner, first, last;
  int32_t *lows, *highs;  // keys of the least and the greatest value of each channel
  // A row for each channel: those of the state, to which each value adds `repeat`, or else those of
  // a part: kCopies of all the rows, `spread` apart, which take turns, so that equal values in a
  // row need not wait for each other.
  int64_t* state;
  int64_t repeat;
  uint32_t* part;
  int64_t spread;
};

constexpr int kCopies = 4;

struct LogHistogramTable {
  // Counts n values, the first of them element `offset` of its piece.
  void (*count)(DType dtype, const void* x, int64_t n, int64_t offset, const LogSink& sink);
  // state[i] += repeat * (the sum of column i of added[rows][stride])
  void (*add)(int64_t* state, const uint32_t* added, int64_t rows, int64_t stride, int64_t columns,
              int64_t repeat);
};

PYOBS_KERNEL_TABLE(LogHistogramTable, log_histogram_table)

}  // namespace pyobserver
