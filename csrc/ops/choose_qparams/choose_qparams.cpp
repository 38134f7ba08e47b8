// CPU glue of choose_qparams.
#include <optional>

#include "choose_qparams_glue.h"

namespace pyobserver {
namespace {

void choose_qparams_op(const Tensor& min_val, const Tensor& max_val, const Tensor& scale,
                       const Tensor& zero_point, const Tensor& eps, int64_t quant_min,
                       int64_t quant_max, int64_t mapping, int64_t symmetric_zero_point,
                       std::optional<Tensor> enabled) {
  const QParamsArgs args = parse_choose_qparams(min_val, max_val, scale, zero_point, eps, quant_min,
                                                quant_max, mapping, symmetric_zero_point);
  if (is_off(kChooseQParams, "enabled", enabled, min_val)) {
    return;
  }
  const float* lows = const_data<float>(min_val);
  const float* highs = const_data<float>(max_val);
  float* scales = mutable_data<float>(scale);
  void* zero_points = zero_point.mutable_data_ptr();
  for (int64_t i = 0; i < min_val.numel(); ++i) {
    write_qparams(lows[i], highs[i], i, args, scales, zero_points);
  }
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CPU, m) {
  m.impl("choose_qparams", TORCH_BOX(&pyobserver::choose_qparams_op));
}
