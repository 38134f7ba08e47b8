// Argument checks of the glue. Each message names the op, the argument, what was expected and
// what came. They are the last line: the Python functions give the same failures as TypeError and
// ValueError.
#pragma once

#include <optional>
#include <sstream>
#include <stdexcept>

#include "dtype.h"
#include "torch_api.h"

namespace pyobserver {

template <class... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (__builtin_expect(!condition, 0)) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }
}

inline DType input_dtype(const char* op, const char* name, const Tensor& x) {
  switch (dtype_of(x)) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      check(false, op, ": ", name,
            ": expected a dense tensor of float32, float64, float16 or bfloat16, got ",
            torch::headeronly::toString(dtype_of(x)));
      return DType::float32;
  }
}

// A tensor of state or parameters: on the device of the data, contiguous, of one dtype.
inline void check_state(const char* op, const char* name, const Tensor& state, const Tensor& x,
                        ScalarType dtype) {
  check(dtype_of(state) == dtype, op, ": ", name, ": expected ", torch::headeronly::toString(dtype),
        ", got ", torch::headeronly::toString(dtype_of(state)));
  check(on_one_device(state, x), op, ": ", name, ": expected a tensor on the device of the data");
  check(state.is_contiguous(), op, ": ", name, ": expected a contiguous tensor");
}

inline void check_numel(const char* op, const char* name, const Tensor& state, int64_t numel) {
  check(state.numel() == numel, op, ": ", name, ": expected ", numel, " elements, got ",
        state.numel());
}

inline void check_channels(const char* op, const char* name, const Tensor& state,
                           int64_t channels) {
  check(state.dim() == 1 && state.numel() == channels, op, ": ", name, ": expected shape (",
        channels, ",), one value for each channel, got ", state.numel(), " values in ", state.dim(),
        " dimensions");
}

inline void check_quant_range(const char* op, int64_t quant_min, int64_t quant_max) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  check(quant_min >= -kLimit && quant_max < kLimit, op,
        ": quant_min, quant_max: expected int32 values, got quant_min=", quant_min,
        ", quant_max=", quant_max);
  check(quant_min < quant_max, op,
        ": quant_min: expected a value below quant_max, got quant_min=", quant_min,
        ", quant_max=", quant_max);
}

enum class Nonfinite { ignore, propagate, raise };

inline Nonfinite parse_nonfinite(const char* op, int64_t nonfinite) {
  check(nonfinite >= 0 && nonfinite <= 2, op,
        ": nonfinite: expected 0 (ignore), 1 (propagate) or 2 (raise), got ", nonfinite);
  return static_cast<Nonfinite>(nonfinite);
}

inline void check_finite(const char* op, Nonfinite nonfinite, int64_t nonfinite_count,
                         int64_t numel) {
  check(nonfinite != Nonfinite::raise || nonfinite_count == 0, op,
        ": x: expected finite values, got ", nonfinite_count, " NaN or infinite of ", numel);
}

inline void check_switch(const char* op, const char* name, const std::optional<Tensor>& enabled,
                         const Tensor& x) {
  if (!enabled.has_value()) {
    return;
  }
  const ScalarType dtype = dtype_of(*enabled);
  check(dtype == ScalarType::Byte || dtype == ScalarType::Bool || dtype == ScalarType::Long, op,
        ": ", name, ": expected uint8, int64 or bool, got ", torch::headeronly::toString(dtype));
  check_state(op, name, *enabled, x, dtype);
  check_numel(op, name, *enabled, 1);
}

// The switch of an op, where there is one, read on the host: for the CPU kernels.
inline bool is_off(const char* op, const char* name, const std::optional<Tensor>& enabled,
                   const Tensor& x) {
  check_switch(op, name, enabled, x);
  if (!enabled.has_value()) {
    return false;
  }
  const void* flag = enabled->const_data_ptr();
  return dtype_of(*enabled) == ScalarType::Long ? *static_cast<const int64_t*>(flag) == 0
                                                : *static_cast<const uint8_t*>(flag) == 0;
}

}  // namespace pyobserver
