// CPU glue of minmax.
#include "minmax.h"

#include <optional>
#include <string>
#include <vector>

#include "../../core/check.h"
#include "../../core/dense.h"
#include "minmax_glue.h"

namespace pyobserver {
namespace {

constexpr const char* kOp = "minmax";

MinmaxUpdate parse_update(const std::string& name) {
  if (name == "running") {
    return MinmaxUpdate::running;
  }
  if (name == "moving_average") {
    return MinmaxUpdate::moving_average;
  }
  check(name == "memoryless", kOp,
        ": update: expected one of running, moving_average, memoryless, got '", name, "'");
  return MinmaxUpdate::memoryless;
}

int64_t reduce_channels(DType dtype, const DenseInput& input, bool finite_only, float* lows,
                        float* highs) {
  const auto& table = minmax_table();
  const auto* data = static_cast<const char*>(input.tensor.const_data_ptr());
  const int64_t channels = input.channels;
  const int64_t parts = part_count(input.tensor.numel());
  if (input.outer < parts) {  // few rows: each part takes some of the channels
    std::vector<int64_t> counts(parts);
    for_each_part(channels, parts, 1, [&](int64_t part, int64_t first, int64_t last) {
      counts[part] = table.channels(dtype, data, input.outer, channels, input.inner, first, last,
                                    finite_only, lows, highs);
    });
    int64_t nonfinite = 0;
    for (int64_t count : counts) {
      nonfinite += count;
    }
    return nonfinite;
  }
  // many rows: each part takes some of them, with a state of its own
  std::vector<float> part_lows(parts * channels, empty_range().low);
  std::vector<float> part_highs(parts * channels, empty_range().high);
  std::vector<int64_t> counts(parts);
  for_each_part(input.outer, parts, 1, [&](int64_t part, int64_t begin, int64_t end) {
    const int64_t offset = begin * channels * input.inner * element_size(dtype);
    counts[part] =
        table.channels(dtype, data + offset, end - begin, channels, input.inner, 0, channels,
                       finite_only, &part_lows[part * channels], &part_highs[part * channels]);
  });
  int64_t nonfinite = 0;
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t c = 0; c < channels; ++c) {
      const Range range = merge({lows[c], highs[c]},
                                {part_lows[part * channels + c], part_highs[part * channels + c]});
      lows[c] = range.low;
      highs[c] = range.high;
    }
    nonfinite += counts[part];
  }
  return nonfinite;
}

void minmax(const Tensor& x, const Tensor& min_val, const Tensor& max_val,
            const Tensor& nonfinite_count, std::optional<int64_t> axis, std::string update_name,
            double averaging_constant, std::string nonfinite_name, std::optional<Tensor> enabled) {
  const DType dtype = input_dtype(kOp, "x", x);
  check_state(kOp, "min_val", min_val, x, ScalarType::Float);
  check_state(kOp, "max_val", max_val, x, ScalarType::Float);
  check_state(kOp, "nonfinite_count", nonfinite_count, x, ScalarType::Long);
  check_numel(kOp, "nonfinite_count", nonfinite_count, 1);
  const MinmaxUpdate update = parse_update(update_name);
  const Nonfinite nonfinite = parse_nonfinite(kOp, nonfinite_name);
  check(averaging_constant > 0.0 && averaging_constant <= 1.0, kOp,
        ": averaging_constant: expected a value in (0, 1], got ", averaging_constant);
  int64_t channel_axis = -1;
  if (axis.has_value() && x.numel() > 0) {
    channel_axis = check_axis(kOp, x, *axis);
    check_channels(kOp, "min_val", min_val, x.size(channel_axis));
    check_channels(kOp, "max_val", max_val, x.size(channel_axis));
  } else if (!axis.has_value()) {
    check_numel(kOp, "min_val", min_val, 1);
    check_numel(kOp, "max_val", max_val, 1);
  }
  if (is_off(kOp, enabled, x) || x.numel() == 0) {
    return;
  }

  const DenseInput input(x, channel_axis);
  const bool finite_only = nonfinite == Nonfinite::ignore;
  std::vector<float> lows(input.channels, empty_range().low);
  std::vector<float> highs(input.channels, empty_range().high);
  int64_t count = 0;
  if (input.channels == 1) {
    const Range range = tensor_range(dtype, input, finite_only, &count);
    lows[0] = range.low;
    highs[0] = range.high;
  } else {
    count = reduce_channels(dtype, input, finite_only, lows.data(), highs.data());
  }
  check_finite(kOp, nonfinite, count, x.numel());

  float* min_data = min_val.mutable_data_ptr<float>();
  float* max_data = max_val.mutable_data_ptr<float>();
  const float constant = static_cast<float>(averaging_constant);
  for (int64_t c = 0; c < input.channels; ++c) {
    const Range state = fold({min_data[c], max_data[c]}, {lows[c], highs[c]}, update, constant);
    min_data[c] = state.low;
    max_data[c] = state.high;
  }
  *nonfinite_count.mutable_data_ptr<int64_t>() += count;
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CPU, m) { m.impl("minmax", TORCH_BOX(&pyobserver::minmax)); }
