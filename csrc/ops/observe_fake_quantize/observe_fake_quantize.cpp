// CPU glue of observe_fake_quantize: minmax, choose_qparams and fake_quantize in one call. The
// tensor is read twice: what it is rounded to depends on all of it.
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "../choose_qparams/choose_qparams_glue.h"
#include "../fake_quantize/fake_quantize_glue.h"
#include "../minmax/minmax_glue.h"

namespace pyobserver {
namespace {

constexpr const char* kOp = "observe_fake_quantize";

Tensor observe_fake_quantize_forward(
    const Tensor& x, const Tensor& min_val, const Tensor& max_val, const Tensor& nonfinite_count,
    const Tensor& scale, const Tensor& zero_point, const Tensor& eps, int64_t quant_min,
    int64_t quant_max, const std::optional<Tensor>& observer_enabled,
    const std::optional<Tensor>& fake_quant_enabled, int64_t mapping,
    const std::optional<int64_t>& axis, int64_t symmetric_zero_point, int64_t update,
    double averaging_constant, int64_t nonfinite,
    const std::optional<std::vector<int64_t>>& block_size, uint8_t* mask) {
  const DType dtype = input_dtype(kOp, "x", x);
  const Grouping grouping = parse_grouping(kOp, x, axis, block_size);
  const MinmaxArgs state = parse_minmax(kOp, x, min_val, max_val, nonfinite_count, grouping, update,
                                        averaging_constant, nonfinite);
  const QParamsArgs qparams = parse_qparams(kOp, x, scale, zero_point, eps, quant_min, quant_max,
                                            mapping, symmetric_zero_point);
  check_grid_params(kOp, x, scale, zero_point, quant_min, quant_max, grouping);
  check_switch(kOp, "fake_quant_enabled", fake_quant_enabled, x);
  const bool observes = !is_off(kOp, "observer_enabled", observer_enabled, x);
  const FakeQuantizeArgs fake_quantize = {
      x, scale, zero_point, quant_min, quant_max, grouping, fake_quant_enabled, nullptr, mask};
  if (!observes || x.numel() == 0) {
    return fake_quantize_forward(kOp, fake_quantize);
  }
  MinmaxChange change(kOp, dtype, x, grouping, state);
  const int64_t groups = change.groups();
  const int64_t zero_size = qparams.zero_dtype == ScalarType::Long ? 8 : 4;
  Scratch<float> scales(groups);
  Scratch<int64_t> zero_points(groups);  // of any of the types
  write_qparams(change.lows(), change.highs(), groups, qparams, scales.data(), zero_points.data());
  if (!is_off(kOp, "fake_quant_enabled", fake_quant_enabled, x)) {
    check_grid_values(kOp, scales.data(), zero_points.data(), zero_point_type(zero_point), groups,
                      quant_min, quant_max);
  }
  change.commit();
  std::memcpy(scale.mutable_data_ptr(), scales.data(), groups * sizeof(float));
  std::memcpy(zero_point.mutable_data_ptr(), zero_points.data(), groups * zero_size);
  return fake_quantize_forward(kOp, fake_quantize);
}

Tensor observe_fake_quantize(const Tensor& x, const Tensor& min_val, const Tensor& max_val,
                             const Tensor& nonfinite_count, const Tensor& scale,
                             const Tensor& zero_point, const Tensor& eps, int64_t quant_min,
                             int64_t quant_max, std::optional<Tensor> observer_enabled,
                             std::optional<Tensor> fake_quant_enabled, int64_t mapping,
                             std::optional<int64_t> axis, int64_t symmetric_zero_point,
                             int64_t update, double averaging_constant, int64_t nonfinite,
                             std::optional<std::vector<int64_t>> block_size) {
  return observe_fake_quantize_forward(x, min_val, max_val, nonfinite_count, scale, zero_point, eps,
                                       quant_min, quant_max, observer_enabled, fake_quant_enabled,
                                       mapping, axis, symmetric_zero_point, update,
                                       averaging_constant, nonfinite, block_size, nullptr);
}

std::tuple<Tensor, Tensor> observe_fake_quantize_mask(
    const Tensor& x, const Tensor& min_val, const Tensor& max_val, const Tensor& nonfinite_count,
    const Tensor& scale, const Tensor& zero_point, const Tensor& eps, int64_t quant_min,
    int64_t quant_max, std::optional<Tensor> observer_enabled,
    std::optional<Tensor> fake_quant_enabled, int64_t mapping, std::optional<int64_t> axis,
    int64_t symmetric_zero_point, int64_t update, double averaging_constant, int64_t nonfinite,
    std::optional<std::vector<int64_t>> block_size) {
  Tensor mask = empty_mask(x);
  Tensor y = observe_fake_quantize_forward(
      x, min_val, max_val, nonfinite_count, scale, zero_point, eps, quant_min, quant_max,
      observer_enabled, fake_quant_enabled, mapping, axis, symmetric_zero_point, update,
      averaging_constant, nonfinite, block_size, mutable_data<uint8_t>(mask));
  return {y, mask};
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CPU, m) {
  m.impl("_observe_fake_quantize", TORCH_BOX(&pyobserver::observe_fake_quantize));
  m.impl("_observe_fake_quantize_mask", TORCH_BOX(&pyobserver::observe_fake_quantize_mask));
}
