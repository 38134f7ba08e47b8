// What the CUDA glue of minmax and observe_fake_quantize shares.
#pragma once

#include "../../core/cuda.h"
#include "../choose_qparams/choose_qparams.h"
#include "minmax_glue.h"

namespace pyobserver {

// What is to be chosen of each range as soon as it is known; scales null: nothing.
struct DeviceQParams {
  QParamsArgs args;
  float* scales;
  void* zero_points;
};

// Folds x, which is not empty, into the state, in one launch and at most one memset. Where values
// that are not finite are to raise, they are counted and the count is read before.
void minmax_on_device(const char* op, DType dtype, const Tensor& x, const Grouping& grouping,
                      const MinmaxArgs& args, const DeviceSwitch& enabled,
                      const DeviceQParams& qparams);

}  // namespace pyobserver
