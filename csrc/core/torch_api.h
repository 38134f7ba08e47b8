// The only include of torch: its stable ABI, so that one build serves every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace pyobserver {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tensor::scalar_type() and the typed pointers ask the library about one type after another; these
// are a few nanoseconds, for arguments that are looked at in every call.
inline ScalarType dtype_of(const Tensor& x) {
  static const int32_t codes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_int64(),
                                  aoti_torch_dtype_int32(), aoti_torch_dtype_uint8()};
  constexpr ScalarType types[] = {ScalarType::Float, ScalarType::Long, ScalarType::Int,
                                  ScalarType::Byte};
  int32_t code = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &code));
  for (int i = 0; i < 4; ++i) {
    if (codes[i] == code) {
      return types[i];
    }
  }
  return x.scalar_type();
}

inline bool on_one_device(const Tensor& a, const Tensor& b) {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  int32_t type_a = 0, type_b = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(a.get(), &type_a));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(b.get(), &type_b));
  return type_a == type_b && (type_a == cpu || a.get_device_index() == b.get_device_index());
}

template <class T>
inline const T* const_data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
inline T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

}  // namespace pyobserver
