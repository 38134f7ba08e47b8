// Glue of a backward that looks at the gradient and at one bit an element.
#pragma once

#include "../../core/parallel.h"
#include "fake_quantize_glue.h"

namespace pyobserver {

// backward: (dtype, grad, mask, out, n); out may be the gradient itself.
template <class Backward>
inline void mask_backward_into(const char* op, const Tensor& grad, const Tensor& mask,
                               const Tensor& out, const Backward& backward) {
  const int64_t n = grad.numel();
  if (n > 0) {
    backward(input_dtype(op, "grad", grad), grad.const_data_ptr(), const_data<uint8_t>(mask),
             out.mutable_data_ptr(), n);
  }
}

template <class Backward>
inline Tensor mask_backward(const char* op, const Tensor& grad, const Tensor& mask,
                            const Backward& backward) {
  input_dtype(op, "grad", grad);
  check_backward(op, grad, mask);
  Tensor out = empty_output(grad, grad.numel() > 0);
  mask_backward_into(op, grad, mask, out, backward);
  return out;
}

// The gradient itself becomes the result.
template <class Backward>
inline void mask_backward_in_place(const char* op, const Tensor& grad, const Tensor& mask,
                                   const Backward& backward) {
  input_dtype(op, "grad", grad);
  check_backward(op, grad, mask);
  mask_backward_into(op, grad, mask, grad, backward);
}

// Such a backward by a kernel of the CPU over torch's threads: (dtype, grad, mask, out, begin,
// end), begin a multiple of 8.
template <class Kernel>
inline auto by_parts(const Kernel& kernel) {
  return [kernel](DType dtype, const void* grad, const uint8_t* mask, void* out, int64_t n) {
    for_each_part(n, part_count(n), 64, [&](int64_t, int64_t begin, int64_t end) {
      kernel(dtype, grad, mask, out, begin, end);
    });
  };
}

}  // namespace pyobserver
