// CPU glue of tensor_quant and fake_tensor_quant, with and without the mask, and their backward.
#include "tensor_quant.h"

#include "../../core/parallel.h"
#include "../fake_quantize/mask_backward.h"
#include "tensor_quant_glue.h"

namespace pyobserver {
namespace {

constexpr float kMostHalf = 65504.0f;

// The values of amax, and where asked for its scales.
template <class T>
void check_amax(const char* op, const T* amax, int64_t count, float max_bound, DType dtype,
                void* scales) {
  for (int64_t i = 0; i < count; ++i) {
    check(!(widen(amax[i]) < 0), op, ": amax: expected no negative value, got ", widen(amax[i]));
  }
  if (scales == nullptr) {
    return;
  }
  dispatch(dtype, scales, [&](const auto* typed) {
    using Scale = typename Pointee<decltype(typed)>::type;
    for (int64_t i = 0; i < count; ++i) {
      const auto scale = amax_scale(widen(amax[i]), max_bound).divisor;
      check(dtype != DType::float16 || !(scale > kMostHalf), op,
            ": amax: expected one whose scale float16 holds (up to ", kMostHalf, "), got ",
            widen(amax[i]), " with the scale ", scale);
      store(static_cast<double>(scale), static_cast<Scale*>(scales) + i);
    }
  });
}

}  // namespace

Tensor tensor_quant_forward(const char* op, const TensorQuantArgs& args, Tensor* scale) {
  const Tensor& x = args.x;
  const DType dtype = input_dtype(op, "inputs", x);
  const AmaxGrouping grouping(op, x, args.amax);
  void* scales = nullptr;
  if (scale != nullptr) {
    *scale = empty_scale(args);
    scales = scale->mutable_data_ptr();
  }
  const DType amax_dtype = input_dtype(op, "amax", args.amax);
  const void* amax = args.amax.const_data_ptr();
  dispatch(amax_dtype, amax, [&](const auto* typed) {
    check_amax(op, typed, args.amax.numel(), args.grid.max_bound, dtype, scales);
  });
  const int64_t n = x.numel();
  const Layout layout = Layout::of_output(x, grouping.grouping());
  Tensor y = empty_output(x, layout.dense && n > 0);
  if (n == 0) {
    return y;
  }
  const AmaxParams params = {amax, amax_dtype, 0, layout.channels, layout.inner};
  const void* from = x.const_data_ptr();
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  const int64_t size = element_size(dtype);
  const auto& table = tensor_quant_table();
  const int64_t parts = part_count(n);
  Scratch<bool> negative(parts);
  for_each_part(n, parts, 64, [&](int64_t part, int64_t begin, int64_t end) {
    bool found = false;
    layout.for_each_span(
        from, size, begin, end,
        [&](const void* span, int64_t first, int64_t count, int64_t offset, int64_t base) {
          AmaxParams of_piece = params;
          of_piece.base = base;
          found |= table.forward(dtype, span, to + first * size, args.mask, first, count, offset,
                                 of_piece, args.grid, args.fake);
        });
    negative[part] = found;
  });
  for (int64_t part = 0; part < parts; ++part) {
    check(!args.is_unsigned || !negative[part], op,
          ": inputs: expected no negative value for an unsigned grid, got one");
  }
  return y;
}

namespace {

Tensor tensor_quant_backward(const Tensor& grad, const Tensor& mask) {
  return mask_backward(kTensorQuantBackward, grad, mask, by_parts(tensor_quant_table().backward));
}

void tensor_quant_backward_(Tensor grad, const Tensor& mask) {
  mask_backward_in_place(kTensorQuantBackward, grad, mask, by_parts(tensor_quant_table().backward));
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CPU, m) {
  m.impl("_tensor_quant", TORCH_BOX(&pyobserver::tensor_quant));
  m.impl("_tensor_quant_mask", TORCH_BOX(&pyobserver::tensor_quant_mask));
  m.impl("_tensor_quant_backward", TORCH_BOX(&pyobserver::tensor_quant_backward));
  m.impl("_tensor_quant_backward_", TORCH_BOX(&pyobserver::tensor_quant_backward_));
  m.impl("_fake_tensor_quant", TORCH_BOX(&pyobserver::fake_tensor_quant));
  m.impl("_fake_tensor_quant_mask", TORCH_BOX(&pyobserver::fake_tensor_quant_mask));
}
