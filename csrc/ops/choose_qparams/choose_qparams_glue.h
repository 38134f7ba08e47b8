// What the glue of choose_qparams and observe_fake_quantize shares; a range is a few operations, so
// there is no kernel per instruction set.
#pragma once

#include "../../core/check.h"
#include "choose_qparams.h"

namespace pyobserver {

struct QParamsArgs {
  ScalarType zero_dtype;
  float eps;
  int64_t quant_min, quant_max;
  Mapping mapping;
  int64_t symmetric_zero_point;
};

inline QParamsArgs parse_qparams(const char* op, const Tensor& x, const Tensor& scale,
                                 const Tensor& zero_point, const Tensor& eps, int64_t quant_min,
                                 int64_t quant_max, int64_t mapping_mode,
                                 int64_t symmetric_zero_point) {
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
    check(zero_dtype == ScalarType::Int || zero_dtype == ScalarType::Long, op,
          ": zero_point: expected int32 or int64, got ", torch::headeronly::toString(zero_dtype));
  }
  check_state(op, "zero_point", zero_point, x, zero_dtype);
  check_state(op, "eps", eps, x, ScalarType::Float);
  check_numel(op, "eps", eps, 1);
  check_quant_range(op, quant_min, quant_max);
  check(mapping != Mapping::fused_symmetric || quant_max - quant_min >= 2, op,
        ": quant_max: expected at least quant_min + 2 for fused_symmetric, got ", quant_max);
  check(symmetric_zero_point > -(int64_t{1} << 31) && symmetric_zero_point < (int64_t{1} << 31), op,
        ": symmetric_zero_point: expected an int32 value, got ", symmetric_zero_point);
  return {zero_dtype, *const_data<float>(eps), quant_min, quant_max, mapping, symmetric_zero_point};
}

// Scale and zero point of `count` ranges; zero_points are of args.zero_dtype.
inline void write_qparams(const float* lows, const float* highs, int64_t count,
                          const QParamsArgs& args, float* scales, void* zero_points) {
  for (int64_t i = 0; i < count; ++i) {
    const QParams qparams = choose_qparams(lows[i], highs[i], args.eps, args.quant_min,
                                           args.quant_max, args.mapping, args.symmetric_zero_point);
    scales[i] = qparams.scale;
    if (args.zero_dtype == ScalarType::Float) {
      static_cast<float*>(zero_points)[i] = qparams.float_zero_point;
    } else if (args.zero_dtype == ScalarType::Int) {
      static_cast<int32_t*>(zero_points)[i] = static_cast<int32_t>(qparams.zero_point);
    } else {
      static_cast<int64_t*>(zero_points)[i] = qparams.zero_point;
    }
  }
}

}  // namespace pyobserver
