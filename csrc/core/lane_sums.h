// Two sums of doubles at once, in an order that depends on their number alone: the same bytes for
// every instruction set, number of threads and device.
//
// The terms are cut into chunks. A chunk is summed in kLanes lanes, term e in lane e % kLanes,
// which a tree adds up, the far half to the near one. The sums of the chunks are added like the
// terms of one chunk. No lane is ever -0: a term of zero may be left out.
#pragma once

#include "dtype.h"

namespace pyobserver {

constexpr int kLanes = 256;

struct PairSums {
  double first, second;
};

// Terms of a chunk, of so many terms in each of the groups; `least` or some doublings of it.
PYOBS_HD int64_t chunk_of_sums(int64_t members, int64_t groups, int64_t least = 4096) {
  constexpr int64_t kMostChunks = 65536;  // but for those that a group has at least
  int64_t chunk = least;
  while (chunk < members && (members + chunk - 1) / chunk * groups > kMostChunks) {
    chunk *= 2;
  }
  return chunk;
}

// The rest is for the CPU, see lane_sums.cuh.

struct Lanes {
  double first[kLanes], second[kLanes];
};

PYOBS_HD void clear(Lanes* lanes, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    lanes->first[j] = 0.0;
    lanes->second[j] = 0.0;
  }
}

// The far half to the near one, until one is left. Lanes from `used` on are zeros.
PYOBS_HD PairSums fold(Lanes* lanes, int64_t used) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t j = 0; half < used && j < half; ++j) {
      lanes->first[j] += lanes->first[j + half];
      lanes->second[j] += lanes->second[j + half];
    }
  }
  return {lanes->first[0], lanes->second[0]};
}

// How many lanes so many terms use, in a power of two.
PYOBS_HD int64_t lanes_of(int64_t count) {
  int64_t lanes = 1;
  while (lanes < count && lanes < kLanes) {
    lanes *= 2;
  }
  return lanes;
}

PYOBS_HD PairSums total_of_chunks(const PairSums* sums, int64_t chunks) {
  Lanes lanes;
  const int64_t used = lanes_of(chunks);
  clear(&lanes, used);
  for (int64_t k = 0; k < chunks; ++k) {
    lanes.first[k % kLanes] += sums[k].first;
    lanes.second[k % kLanes] += sums[k].second;
  }
  return fold(&lanes, used);
}

}  // namespace pyobserver
