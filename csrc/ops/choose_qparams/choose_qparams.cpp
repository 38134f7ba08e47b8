// CPU glue of choose_qparams; a range is a few operations, so there is no kernel per set.
#include "choose_qparams.h"

#include <optional>
#include <string>

#include "../../core/check.h"

namespace pyobserver {
namespace {

constexpr const char* kOp = "choose_qparams";

Mapping parse_mapping(const std::string& name) {
  if (name == "affine") {
    return Mapping::affine;
  }
  if (name == "symmetric") {
    return Mapping::symmetric;
  }
  if (name == "affine_float") {
    return Mapping::affine_float;
  }
  if (name == "fused_affine") {
    return Mapping::fused_affine;
  }
  check(name == "fused_symmetric", kOp,
        ": mapping: expected one of affine, symmetric, affine_float, fused_affine, "
        "fused_symmetric, got '",
        name, "'");
  return Mapping::fused_symmetric;
}

void choose_qparams_op(const Tensor& min_val, const Tensor& max_val, const Tensor& scale,
                       const Tensor& zero_point, const Tensor& eps, int64_t quant_min,
                       int64_t quant_max, std::string mapping_name, int64_t symmetric_zero_point,
                       std::optional<Tensor> enabled) {
  const Mapping mapping = parse_mapping(mapping_name);
  const int64_t count = min_val.numel();
  check_state(kOp, "min_val", min_val, min_val, ScalarType::Float);
  for (const auto& [name, tensor] :
       {std::pair<const char*, const Tensor*>{"max_val", &max_val}, {"scale", &scale}}) {
    check_state(kOp, name, *tensor, min_val, ScalarType::Float);
    check_numel(kOp, name, *tensor, count);
  }
  const ScalarType zero_dtype = zero_point.scalar_type();
  if (mapping == Mapping::affine_float) {
    check(zero_dtype == ScalarType::Float, kOp, ": zero_point: expected float32, got ",
          torch::headeronly::toString(zero_dtype));
  } else {
    check(zero_dtype == ScalarType::Int || zero_dtype == ScalarType::Long, kOp,
          ": zero_point: expected int32 or int64, got ", torch::headeronly::toString(zero_dtype));
  }
  check_state(kOp, "zero_point", zero_point, min_val, zero_dtype);
  check_numel(kOp, "zero_point", zero_point, count);
  check_state(kOp, "eps", eps, min_val, ScalarType::Float);
  check_numel(kOp, "eps", eps, 1);
  check_quant_range(kOp, quant_min, quant_max);
  check(mapping != Mapping::fused_symmetric || quant_max - quant_min >= 2, kOp,
        ": quant_max: expected at least quant_min + 2 for fused_symmetric, got ", quant_max);
  check(symmetric_zero_point > -(int64_t{1} << 31) && symmetric_zero_point < (int64_t{1} << 31),
        kOp, ": symmetric_zero_point: expected an int32 value, got ", symmetric_zero_point);
  if (is_off(kOp, enabled, min_val) || count == 0) {
    return;
  }

  const float* lows = min_val.const_data_ptr<float>();
  const float* highs = max_val.const_data_ptr<float>();
  const float least = *eps.const_data_ptr<float>();
  float* scales = scale.mutable_data_ptr<float>();
  void* zero_points = zero_point.mutable_data_ptr();
  for (int64_t i = 0; i < count; ++i) {
    const QParams qparams = choose_qparams(lows[i], highs[i], least, quant_min, quant_max, mapping,
                                           symmetric_zero_point);
    scales[i] = qparams.scale;
    if (zero_dtype == ScalarType::Float) {
      static_cast<float*>(zero_points)[i] = qparams.float_zero_point;
    } else if (zero_dtype == ScalarType::Int) {
      static_cast<int32_t*>(zero_points)[i] = static_cast<int32_t>(qparams.zero_point);
    } else {
      static_cast<int64_t*>(zero_points)[i] = qparams.zero_point;
    }
  }
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CPU, m) {
  m.impl("choose_qparams", TORCH_BOX(&pyobserver::choose_qparams_op));
}
