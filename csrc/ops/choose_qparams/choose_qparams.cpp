// CPU glue of choose_qparams.
#include "choose_qparams.h"

#include <optional>

#include "choose_qparams_glue.h"

namespace pyobserver {
namespace {

constexpr const char* kOp = "choose_qparams";

void choose_qparams_op(const Tensor& min_val, const Tensor& max_val, const Tensor& scale,
                       const Tensor& zero_point, const Tensor& eps, int64_t quant_min,
                       int64_t quant_max, int64_t mapping, int64_t symmetric_zero_point,
                       std::optional<Tensor> enabled) {
  const int64_t count = min_val.numel();
  check_state(kOp, "min_val", min_val, min_val, ScalarType::Float);
  check_state(kOp, "max_val", max_val, min_val, ScalarType::Float);
  check_numel(kOp, "max_val", max_val, count);
  const QParamsArgs args = parse_qparams(kOp, min_val, scale, zero_point, eps, quant_min, quant_max,
                                         mapping, symmetric_zero_point);
  check_numel(kOp, "scale", scale, count);
  check_numel(kOp, "zero_point", zero_point, count);
  if (!is_off(kOp, "enabled", enabled, min_val)) {
    write_qparams(const_data<float>(min_val), const_data<float>(max_val), count, args,
                  mutable_data<float>(scale), zero_point.mutable_data_ptr());
  }
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CPU, m) {
  m.impl("choose_qparams", TORCH_BOX(&pyobserver::choose_qparams_op));
}
