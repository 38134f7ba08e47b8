// CPU glue of fake_quantize, with and without the mask, and of its backward.
#include "fake_quantize.h"

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "fake_quantize_glue.h"

namespace pyobserver {
namespace {

// The parameters as the kernel takes them, and the storage they need.
struct Params {
  std::vector<float> inverse_scale;
  std::vector<double> zero_point;
  ChannelParams view;
  QuantGrid grid;
};

template <class T>
void read_zero_points(const Tensor& zero_point, bool is_float, int64_t quant_min, int64_t quant_max,
                      std::vector<double>* out) {
  const T* values = zero_point.const_data_ptr<T>();
  for (size_t c = 0; c < out->size(); ++c) {
    const double value = static_cast<double>(values[c]);
    check(is_float ||
              (value >= static_cast<double>(quant_min) && value <= static_cast<double>(quant_max)),
          kFakeQuantize, ": zero_point: expected values in [quant_min, quant_max] = [", quant_min,
          ", ", quant_max, "], got ", value);
    (*out)[c] = value;
  }
}

Params read_params(DType dtype, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
                   int64_t quant_max, bool per_channel) {
  const ScalarType zero_dtype = zero_point.scalar_type();
  const bool float_zero_point = zero_dtype == ScalarType::Float;
  const int64_t channels = scale.numel();
  Params params;
  params.inverse_scale.resize(channels);
  params.zero_point.resize(channels);
  const float* scales = scale.const_data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    check(scales[c] > 0.0f && is_finite(scales[c]), kFakeQuantize,
          ": scale: expected positive finite values, got ", scales[c]);
    params.inverse_scale[c] = 1.0f / scales[c];
  }
  if (float_zero_point) {
    read_zero_points<float>(zero_point, true, quant_min, quant_max, &params.zero_point);
  } else if (zero_dtype == ScalarType::Int) {
    read_zero_points<int32_t>(zero_point, false, quant_min, quant_max, &params.zero_point);
  } else {
    read_zero_points<int64_t>(zero_point, false, quant_min, quant_max, &params.zero_point);
  }
  params.grid = quant_grid(dtype, quant_min, quant_max, per_channel, float_zero_point);
  params.view = {scales, params.inverse_scale.data(), params.zero_point.data(), channels, 1};
  return params;
}

}  // namespace

Tensor fake_quantize_forward(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                             int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis,
                             const std::optional<Tensor>& enabled, uint8_t* mask) {
  const DType dtype = input_dtype(kFakeQuantize, "x", x);
  const int64_t channel_axis = axis.has_value() ? check_axis(kFakeQuantize, x, *axis) : -1;
  check_grid_params(kFakeQuantize, x, scale, zero_point, quant_min, quant_max, channel_axis);
  const bool off = is_off(kFakeQuantize, enabled, x);
  Params params;  // what is switched off may hold any scale
  if (!off) {
    params = read_params(dtype, scale, zero_point, quant_min, quant_max, channel_axis >= 0);
  }
  Tensor y = empty_output(x);
  const int64_t n = x.numel();
  if (n == 0) {
    return y;
  }
  const DenseInput input(x, channel_axis);
  params.view.inner = input.inner;
  const auto* from = static_cast<const char*>(input.tensor.const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  const auto& table = fake_quantize_table();
  for_each_part(n, part_count(n), 64, [&](int64_t, int64_t begin, int64_t end) {
    if (off) {
      const int64_t size = element_size(dtype);
      std::memcpy(to + begin * size, from + begin * size, (end - begin) * size);
      if (mask != nullptr) {
        std::memset(mask + begin / 8, 0xff, (end - begin + 7) / 8);
      }
    } else {
      table.forward(dtype, from, to, mask, begin, end, params.view, params.grid);
    }
  });
  if (off && mask != nullptr && n % 8 != 0) {
    mask[n / 8] = static_cast<uint8_t>((1u << (n % 8)) - 1u);
  }
  return y;
}

namespace {

Tensor fake_quantize_backward(const Tensor& grad, const Tensor& mask) {
  const DType dtype = input_dtype(kFakeQuantizeBackward, "grad", grad);
  const int64_t n = grad.numel();
  check_backward(kFakeQuantizeBackward, grad, mask);
  Tensor out = empty_output(grad);
  if (n == 0) {
    return out;
  }
  const void* from = grad.const_data_ptr();
  void* to = out.mutable_data_ptr();
  const uint8_t* bits = mask.const_data_ptr<uint8_t>();
  const auto& table = fake_quantize_table();
  for_each_part(n, part_count(n), 64, [&](int64_t, int64_t begin, int64_t end) {
    table.backward(dtype, from, bits, to, begin, end);
  });
  return out;
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CPU, m) {
  m.impl("_fake_quantize", TORCH_BOX(&pyobserver::fake_quantize));
  m.impl("_fake_quantize_mask", TORCH_BOX(&pyobserver::fake_quantize_mask));
  m.impl("_fake_quantize_backward", TORCH_BOX(&pyobserver::fake_quantize_backward));
}
