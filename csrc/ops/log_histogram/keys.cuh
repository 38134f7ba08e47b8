// Keys of values, as blocks reduce them.
#pragma once

#include "../../core/device.cuh"
#include "log_histogram.h"

namespace pyobserver {

PYOBS_DEVICE Keys keys_of_block(Keys keys) {
  return {reduce_block(keys.low, kMostKey, [](int32_t a, int32_t b) { return a < b ? a : b; }),
          reduce_block(keys.high, kLeastKey, [](int32_t a, int32_t b) { return a > b ? a : b; })};
}

}  // namespace pyobserver
