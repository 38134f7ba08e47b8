// CUDA kernel and glue of choose_qparams: a thread for each range, one launch; eps and the switch
// are read on the device.
#include <optional>

#include "../../core/cuda.h"
#include "choose_qparams_glue.h"

namespace pyobserver {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksPerMultiprocessor = 16;

__global__ void choose_qparams_kernel(const float* lows, const float* highs, int64_t count,
                                      QParamsArgs args, float* scales, void* zero_points,
                                      DeviceSwitch enabled) {
  if (is_off(enabled)) {
    return;
  }
  for (int64_t i = thread_of_grid(); i < count; i += threads_of_grid()) {
    write_qparams(lows[i], highs[i], i, args, scales, zero_points);
  }
}

void choose_qparams_op(const Tensor& min_val, const Tensor& max_val, const Tensor& scale,
                       const Tensor& zero_point, const Tensor& eps, int64_t quant_min,
                       int64_t quant_max, int64_t mapping, int64_t symmetric_zero_point,
                       std::optional<Tensor> enabled) {
  const QParamsArgs args = parse_choose_qparams(min_val, max_val, scale, zero_point, eps, quant_min,
                                                quant_max, mapping, symmetric_zero_point);
  const DeviceSwitch on = device_switch(kChooseQParams, "enabled", enabled, min_val);
  const int64_t count = min_val.numel();
  if (count == 0) {
    return;
  }
  const CudaContext cuda(kChooseQParams, min_val);
  cuda.launch(choose_qparams_kernel, cuda.blocks(count, kThreads, kBlocksPerMultiprocessor),
              kThreads, 0, const_data<float>(min_val), const_data<float>(max_val), count, args,
              mutable_data<float>(scale), zero_point.mutable_data_ptr(), on);
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CUDA, m) {
  m.impl("choose_qparams", TORCH_BOX(&pyobserver::choose_qparams_op));
}
