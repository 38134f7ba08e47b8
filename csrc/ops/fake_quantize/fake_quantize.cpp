// CPU glue of fake_quantize, with and without the mask, and of its backward.
#include "fake_quantize.h"

#include <cstring>
#include <optional>

#include "../../core/parallel.h"
#include "fake_quantize_glue.h"
#include "mask_backward.h"

namespace pyobserver {
Tensor fake_quantize_forward(const char* op, const FakeQuantizeArgs& args) {
  const Tensor& x = args.x;
  const DType dtype = input_dtype(op, "x", x);
  check_grid_params(op, x, args.scale, args.zero_point, args.quant_min, args.quant_max,
                    args.grouping);
  const bool off = is_off(op, "enabled", args.enabled, x);
  const int64_t n = x.numel();
  const Layout layout = Layout::of_output(x, args.grouping);
  const bool dense = layout.dense && n > 0;
  if (args.out != nullptr) {
    check_out(op, x, *args.out, dense);
  }
  ChannelParams params = {const_data<float>(args.scale),
                          args.zero_point.const_data_ptr(),
                          zero_point_type(args.zero_point),
                          0,
                          layout.channels,
                          layout.inner};
  const bool per_group = args.grouping.axis >= 0 || args.grouping.block_size != nullptr;
  const auto grid_of = [&](bool float_zero_point) {
    return quant_grid(dtype, args.quant_min, args.quant_max, per_group, float_zero_point);
  };
  const bool rounds = args.rounds_zero_point && !off && n > 0;
  Scratch<int32_t> rounded(rounds ? layout.groups : 0);
  Scratch<float> usable(rounds ? layout.groups : 0);
  if (rounds) {
    const float* zero_points = const_data<float>(args.zero_point);
    if (args.least_scale == 0.0f) {
      check_learned_values(op, params.scale, zero_points, layout.groups);
    }
    for (int64_t i = 0; i < layout.groups; ++i) {
      rounded[i] = rounded_zero_point(zero_points[i], grid_of(false));
      usable[i] = usable_scale(params.scale[i], zero_points[i], args.least_scale);
    }
    params.scale = usable.data();
    params.zero_point = rounded.data();
    params.type = ZeroPointType::int32;
  } else if (!off && n > 0) {  // what is switched off may hold any scale
    check_grid_values(op, params.scale, params.zero_point, params.type, layout.groups,
                      args.quant_min, args.quant_max);
  }
  Tensor y = args.out != nullptr ? *args.out : empty_output(x, dense);
  if (n == 0) {
    return y;
  }
  const QuantGrid grid = grid_of(params.type == ZeroPointType::float32);
  const void* from = x.const_data_ptr();
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  const int64_t size = element_size(dtype);
  const auto& table = fake_quantize_table();
  uint8_t* mask = args.mask;
  for_each_part(n, part_count(n), 64, [&](int64_t, int64_t begin, int64_t end) {
    layout.for_each_span(
        from, size, begin, end,
        [&](const void* part, int64_t first, int64_t count, int64_t offset, int64_t base) {
          if (off) {
            std::memmove(to + first * size, part, count * size);  // x may be the output
          } else {
            ChannelParams of_piece = params;
            of_piece.base = base;
            table.forward(dtype, part, to + first * size, mask, first, count, offset, of_piece,
                          grid);
          }
        });
    if (off && mask != nullptr) {
      std::memset(mask + begin / 8, 0xff, (end - begin + 7) / 8);
    }
  });
  if (off && mask != nullptr && n % 8 != 0) {
    mask[n / 8] = static_cast<uint8_t>((1u << (n % 8)) - 1u);
  }
  return y;
}

namespace {

Tensor fake_quantize_backward(const Tensor& grad, const Tensor& mask) {
  return mask_backward(kFakeQuantizeBackward, grad, mask, by_parts(fake_quantize_table().backward));
}

void fake_quantize_backward_(Tensor grad, const Tensor& mask) {
  mask_backward_in_place(kFakeQuantizeBackward, grad, mask,
                         by_parts(fake_quantize_table().backward));
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CPU, m) {
  m.impl("_fake_quantize", TORCH_BOX(&pyobserver::fake_quantize));
  m.impl("_fake_quantize_out", TORCH_BOX(&pyobserver::fake_quantize_out));
  m.impl("_fake_quantize_mask", TORCH_BOX(&pyobserver::fake_quantize_mask));
  m.impl("_fake_quantize_backward", TORCH_BOX(&pyobserver::fake_quantize_backward));
  m.impl("_fake_quantize_backward_", TORCH_BOX(&pyobserver::fake_quantize_backward_));
}
