// What the glue of choose_qparams and observe_fake_quantize shares, on the CPU and on CUDA; a range
// is a few operations, so there is no kernel per instruction set.
#pragma once

#include "../../core/check.h"
#include "../fake_quantize/fake_quantize_glue.h"
#include "choose_qparams.h"

namespace pyobserver {

constexpr const char* kChooseQParams = "choose_qparams";

// learned: a zero point may be a float that holds an integer.
inline QParamsArgs parse_qparams(const char* op, const Tensor& x, const Tensor& scale,
                                 const Tensor& zero_point, const Tensor& eps, int64_t quant_min,
                                 int64_t quant_max, int64_t mapping_mode,
                                 int64_t symmetric_zero_point, bool learned = false) {
  check(mapping_mode >= 0 && mapping_mode <= 4, op,
        ": mapping: expected 0 (affine), 1 (symmetric), 2 (affine_float), 3 (fused_affine) or 4 "
        "(fused_symmetric), got ",
        mapping_mode);
  const Mapping mapping = static_cast<Mapping>(mapping_mode);
  check_state(op, "scale", scale, x, ScalarType::Float);
  const ScalarType zero_dtype = dtype_of(zero_point);
  if (mapping == Mapping::affine_float) {
    check(zero_dtype == ScalarType::Float, op, ": zero_point: expected float32, got ",
          torch::headeronly::toString(zero_dtype));
  } else {
    check(zero_dtype == ScalarType::Int || zero_dtype == ScalarType::Long ||
              (learned && zero_dtype == ScalarType::Float),
          op, ": zero_point: expected int32", learned ? ", int64 or float32" : " or int64",
          ", got ", torch::headeronly::toString(zero_dtype));
  }
  check_state(op, "zero_point", zero_point, x, zero_dtype);
  check_state(op, "eps", eps, x, ScalarType::Float);
  check_numel(op, "eps", eps, 1);
  check_quant_range(op, quant_min, quant_max);
  check(mapping != Mapping::fused_symmetric || quant_max - quant_min >= 2, op,
        ": quant_max: expected at least quant_min + 2 for fused_symmetric, got ", quant_max);
  check(symmetric_zero_point > -(int64_t{1} << 31) && symmetric_zero_point < (int64_t{1} << 31), op,
        ": symmetric_zero_point: expected an int32 value, got ", symmetric_zero_point);
  return {zero_point_type(zero_point), const_data<float>(eps), quant_min, quant_max, mapping,
          symmetric_zero_point};
}

// The arguments of the op itself; its ranges are min_val's.
inline QParamsArgs parse_choose_qparams(const Tensor& min_val, const Tensor& max_val,
                                        const Tensor& scale, const Tensor& zero_point,
                                        const Tensor& eps, int64_t quant_min, int64_t quant_max,
                                        int64_t mapping, int64_t symmetric_zero_point) {
  const int64_t count = min_val.numel();
  check_state(kChooseQParams, "min_val", min_val, min_val, ScalarType::Float);
  check_state(kChooseQParams, "max_val", max_val, min_val, ScalarType::Float);
  check_numel(kChooseQParams, "max_val", max_val, count);
  const QParamsArgs args = parse_qparams(kChooseQParams, min_val, scale, zero_point, eps, quant_min,
                                         quant_max, mapping, symmetric_zero_point, true);
  check_numel(kChooseQParams, "scale", scale, count);
  check_numel(kChooseQParams, "zero_point", zero_point, count);
  return args;
}

}  // namespace pyobserver
