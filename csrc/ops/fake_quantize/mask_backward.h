// CPU glue of a backward that looks at the gradient and at one bit an element.
#pragma once

#include "../../core/parallel.h"
#include "fake_quantize_glue.h"

namespace pyobserver {

// backward: (dtype, grad, mask, out, begin, end), begin a multiple of 8.
template <class Backward>
inline Tensor mask_backward(const char* op, const Tensor& grad, const Tensor& mask,
                            const Backward& backward) {
  const DType dtype = input_dtype(op, "grad", grad);
  const int64_t n = grad.numel();
  check_backward(op, grad, mask);
  Tensor out = empty_output(grad, n > 0);
  if (n == 0) {
    return out;
  }
  const void* from = grad.const_data_ptr();
  void* to = out.mutable_data_ptr();
  const uint8_t* bits = const_data<uint8_t>(mask);
  for_each_part(n, part_count(n), 64, [&](int64_t, int64_t begin, int64_t end) {
    backward(dtype, from, bits, to, begin, end);
  });
  return out;
}

}  // namespace pyobserver
