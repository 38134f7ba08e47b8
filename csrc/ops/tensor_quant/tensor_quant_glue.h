// What the glue of tensor_quant shares on the CPU and on CUDA: the arguments, and the ops.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "../../core/check.h"
#include "../../core/layout.h"
#include "../fake_quantize/fake_quantize_glue.h"
#include "tensor_quant.h"

namespace pyobserver {

constexpr const char* kTensorQuant = "tensor_quant";
constexpr const char* kFakeTensorQuant = "fake_tensor_quant";
constexpr const char* kTensorQuantBackward = "tensor_quant_backward";

// Which elements share an amax: those along the dimensions that it is broadcast over.
class AmaxGrouping {
 public:
  AmaxGrouping(const char* op, const Tensor& x, const Tensor& amax) {
    const int64_t missing = x.dim() - amax.dim();
    bool broadcasts = missing >= 0;
    for (int64_t d = 0; broadcasts && d < amax.dim(); ++d) {
      broadcasts = amax.size(d) == 1 || amax.size(d) == x.size(missing + d);
    }
    check(broadcasts, op, ": amax: expected a shape that broadcasts to that of inputs, got ",
          amax.numel(), " values in ", amax.dim(), " dimensions");
    if (amax.numel() == 1 || x.numel() == 0) {
      return;
    }
    sizes_.resize(x.dim());
    for (int64_t d = 0; d < x.dim(); ++d) {
      const bool kept = d >= missing && amax.size(d - missing) > 1;
      sizes_[d] = kept ? 1 : x.size(d);
    }
    grouping_.block_size = &sizes_;
  }
  AmaxGrouping(const AmaxGrouping&) = delete;

  const Grouping& grouping() const { return grouping_; }

 private:
  std::vector<int64_t> sizes_;
  Grouping grouping_;
};

inline void check_num_bits(const char* op, int64_t num_bits) {
  check(num_bits >= 0 && num_bits <= kMostBits, op, ": num_bits: expected an integer in [0, ",
        kMostBits, "], got ", num_bits);
}

struct TensorQuantArgs {
  const Tensor& x;
  Tensor amax;  // contiguous
  AmaxGrid grid;
  bool is_unsigned, fake;
  uint8_t* mask;  // may be null
};

// Each of the two libraries has its own. scale: null, or where the scales go.
Tensor tensor_quant_forward(const char* op, const TensorQuantArgs& args, Tensor* scale);

inline Tensor tensor_quant_any(const char* op, const Tensor& inputs, const Tensor& amax,
                               int64_t num_bits, bool is_unsigned, bool narrow_range, uint8_t* mask,
                               Tensor* scale) {
  input_dtype(op, "inputs", inputs);
  input_dtype(op, "amax", amax);
  check(on_one_device(amax, inputs), op, ": amax: expected a tensor on the device of inputs");
  check_num_bits(op, num_bits);
  return tensor_quant_forward(
      op,
      {inputs, amax.is_contiguous() ? amax : torch::stable::contiguous(amax),
       amax_grid(num_bits, is_unsigned, narrow_range), is_unsigned, scale == nullptr, mask},
      scale);
}

// The scales of the result: amax's shape, x's dtype.
inline Tensor empty_scale(const TensorQuantArgs& args) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(args.x.get(), &dtype));
  return empty_strided(args.x, args.amax.sizes(), args.amax.strides(), dtype);
}

inline Tensor fake_tensor_quant(const Tensor& inputs, const Tensor& amax, int64_t num_bits,
                                bool is_unsigned, bool narrow_range) {
  return tensor_quant_any(kFakeTensorQuant, inputs, amax, num_bits, is_unsigned, narrow_range,
                          nullptr, nullptr);
}

inline std::tuple<Tensor, Tensor> fake_tensor_quant_mask(const Tensor& inputs, const Tensor& amax,
                                                         int64_t num_bits, bool is_unsigned,
                                                         bool narrow_range) {
  Tensor mask = empty_mask(inputs);
  Tensor y = tensor_quant_any(kFakeTensorQuant, inputs, amax, num_bits, is_unsigned, narrow_range,
                              mutable_data<uint8_t>(mask), nullptr);
  return {y, mask};
}

inline std::tuple<Tensor, Tensor> tensor_quant(const Tensor& inputs, const Tensor& amax,
                                               int64_t num_bits, bool is_unsigned,
                                               bool narrow_range) {
  Tensor scale = amax;
  Tensor y = tensor_quant_any(kTensorQuant, inputs, amax, num_bits, is_unsigned, narrow_range,
                              nullptr, &scale);
  return {y, scale};
}

inline std::tuple<Tensor, Tensor, Tensor> tensor_quant_mask(const Tensor& inputs,
                                                            const Tensor& amax, int64_t num_bits,
                                                            bool is_unsigned, bool narrow_range) {
  Tensor mask = empty_mask(inputs);
  Tensor scale = amax;
  Tensor y = tensor_quant_any(kTensorQuant, inputs, amax, num_bits, is_unsigned, narrow_range,
                              mutable_data<uint8_t>(mask), &scale);
  return {y, scale, mask};
}

}  // namespace pyobserver
