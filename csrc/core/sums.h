// The one order in which doubles are added, wherever they are.
#pragma once

#include "dtype.h"

namespace pyobserver {

// A sum of doubles is taken in so many, in turn, and those in one order: the same for every
// instruction set and device.
constexpr int kSums = 8;

PYOBS_HD double total_of(const double* sums) {
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

}  // namespace pyobserver
