// CPU glue of observe_fake_quantize: minmax, choose_qparams and fake_quantize in one call. The
// tensor is read twice: what it is rounded to depends on all of it.
#include <cstring>

#include "observe_fake_quantize_glue.h"

namespace pyobserver {

Tensor observe_fake_quantize_forward(const ObserveArgs& args) {
  const char* op = kObserveFakeQuantize;
  const FakeQuantizeArgs& given = args.fake_quantize;
  const QParamsArgs& qparams = args.qparams;
  if (is_off(op, "observer_enabled", args.enabled, given.x) || given.x.numel() == 0) {
    return fake_quantize_forward(op, given);
  }
  MinmaxChange change(op, args.dtype, given.x, given.grouping, args.minmax);
  const int64_t groups = change.groups();
  const int64_t zero_size = qparams.zero_type == ZeroPointType::int64 ? 8 : 4;
  Scratch<float> scales(groups);
  Scratch<int64_t> zero_points(groups);  // of any of the types
  for (int64_t i = 0; i < groups; ++i) {
    write_qparams(change.lows()[i], change.highs()[i], i, qparams, scales.data(),
                  zero_points.data());
  }
  if (!is_off(op, "fake_quant_enabled", given.enabled, given.x)) {
    check_grid_values(op, scales.data(), zero_points.data(), qparams.zero_type, groups,
                      given.quant_min, given.quant_max);
  }
  change.commit();
  std::memcpy(given.scale.mutable_data_ptr(), scales.data(), groups * sizeof(float));
  std::memcpy(given.zero_point.mutable_data_ptr(), zero_points.data(), groups * zero_size);
  return fake_quantize_forward(op, given);
}

}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CPU, m) {
  m.impl("_observe_fake_quantize", TORCH_BOX(&pyobserver::observe_fake_quantize));
  m.impl("_observe_fake_quantize_mask", TORCH_BOX(&pyobserver::observe_fake_quantize_mask));
}
