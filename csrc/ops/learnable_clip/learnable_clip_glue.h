// What the glue of learnable_clip shares, on the CPU and on CUDA.
#pragma once

#include <optional>
#include <tuple>

#include "../tensor_quant/tensor_quant_glue.h"
#include "learnable_clip.h"

namespace pyobserver {

constexpr const char* kLearnableClip = "learnable_clip";
constexpr const char* kLearnableClipBackward = "learnable_clip_backward";

struct LearnableClipArgs {
  const Tensor &x, &low, &high;
  ClipGrid grid;
  bool is_unsigned;
  ClipMask mask;
};

// Each of the two libraries has its own.
Tensor learnable_clip_forward(const LearnableClipArgs& args);

inline Tensor learnable_clip_any(const Tensor& x, const Tensor& low, const Tensor& high,
                                 const std::optional<int64_t>& num_bits, bool is_unsigned,
                                 bool narrow_range, const ClipMask& mask) {
  input_dtype(kLearnableClip, "x", x);
  check_state(kLearnableClip, "low", low, x, ScalarType::Float);
  check_state(kLearnableClip, "high", high, x, ScalarType::Float);
  check_numel(kLearnableClip, "low", low, 1);
  check_numel(kLearnableClip, "high", high, 1);
  if (!num_bits.has_value()) {
    return learnable_clip_forward({x, low, high, {false, {}}, false, mask});
  }
  check_num_bits(kLearnableClip, *num_bits);
  const ClipGrid grid = {true, amax_grid(*num_bits, is_unsigned, narrow_range)};
  return learnable_clip_forward({x, low, high, grid, is_unsigned, mask});
}

inline Tensor learnable_clip(const Tensor& x, const Tensor& low, const Tensor& high,
                             std::optional<int64_t> num_bits, bool is_unsigned, bool narrow_range) {
  return learnable_clip_any(x, low, high, num_bits, is_unsigned, narrow_range, {nullptr, nullptr});
}

// The mask: a plane of bits for each bound.
inline std::tuple<Tensor, Tensor> learnable_clip_mask(const Tensor& x, const Tensor& low,
                                                      const Tensor& high,
                                                      std::optional<int64_t> num_bits,
                                                      bool is_unsigned, bool narrow_range) {
  const int64_t bytes = mask_bytes(x);
  const int64_t sizes[] = {2, bytes}, strides[] = {std::max<int64_t>(bytes, 1), 1};
  Tensor mask = empty_strided(x, {sizes, 2}, {strides, 2}, aoti_torch_dtype_uint8());
  auto* bits = mutable_data<uint8_t>(mask);
  Tensor y =
      learnable_clip_any(x, low, high, num_bits, is_unsigned, narrow_range, {bits, bits + bytes});
  return {y, mask};
}

// Each of the two libraries has its own. call: but for the memory of the sums; to_bounds: where the
// two sums go. There are elements.
void learnable_clip_sums(const Tensor& grad, ClipBackward call, int64_t chunks, float* to_low,
                         float* to_high);

inline std::tuple<Tensor, Tensor, Tensor> learnable_clip_backward(const Tensor& grad,
                                                                  const Tensor& mask) {
  const char* op = kLearnableClipBackward;
  input_dtype(op, "grad", grad);
  check_dense_gradient(op, grad);
  check_state(op, "mask", mask, grad, ScalarType::Byte);
  const int64_t n = grad.numel(), bytes = mask_bytes(grad);
  check(mask.dim() == 2 && mask.size(0) == 2 && mask.size(1) == bytes, op,
        ": mask: expected shape (2, ", bytes, "), got ", mask.numel(), " values in ", mask.dim(),
        " dimensions");
  Tensor out = empty_output(grad, n > 0);
  Tensor to_low = empty_strided(grad, {}, {}, aoti_torch_dtype_float32());
  Tensor to_high = empty_strided(grad, {}, {}, aoti_torch_dtype_float32());
  if (n == 0) {
    torch::stable::zero_(to_low);
    torch::stable::zero_(to_high);
    return {out, to_low, to_high};
  }
  const auto* bits = const_data<uint8_t>(mask);
  const int64_t chunk = chunk_of_sums(n, 1);
  learnable_clip_sums(
      grad, {grad.const_data_ptr(), bits, bits + bytes, out.mutable_data_ptr(), n, chunk, nullptr},
      (n + chunk - 1) / chunk, mutable_data<float>(to_low), mutable_data<float>(to_high));
  return {out, to_low, to_high};
}

}  // namespace pyobserver
