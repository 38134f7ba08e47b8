// CPU glue of log_histogram.
#include <algorithm>
#include <optional>
#include <vector>

#include "../../core/parallel.h"
#include "../minmax/minmax_glue.h"
#include "log_histogram_glue.h"

namespace pyobserver {
namespace {

// Counts a tensor into the rows of the state, and its least and greatest values into keys.
class LogCount {
 public:
  LogCount(DType dtype, const void* data, const Layout& layout, const LogBins& bins, bool propagate,
           int64_t* state)
      : dtype_(dtype),
        data_(data),
        layout_(layout),
        columns_(columns_of(bins)),
        lows_(layout.groups),
        highs_(layout.groups) {
    sink_ = {bins,         propagate,     layout.channels, layout.inner,  0,       layout.channels,
             lows_.data(), highs_.data(), state,           layout.repeat, nullptr, 0};
    std::fill_n(lows_.data(), layout.groups, kMostKey);
    std::fill_n(highs_.data(), layout.groups, kLeastKey);
  }

  void run() {
    const int64_t cells = layout_.groups * columns_;
    const int64_t worth = layout_.numel / (kWorth * cells);  // parts that have rows of their own
    int64_t parts = part_count(layout_.numel);
    if (worth >= (layout_.groups == 1 ? 1 : parts)) {
      run_parts(std::max(std::min(parts, worth), layout_.numel / kMostOfPart + 1), cells);
    } else if (layout_.groups == 1 || parts == 1) {
      walk(0, layout_.numel, sink_, 0, layout_.groups);
    } else {
      run_groups(parts);
    }
  }

  Range range(int64_t group) { return range_of({lows_[group], highs_[group]}); }

 private:
  static constexpr int64_t kWorth = 4;  // values for each count that a part has of its own
  static constexpr int64_t kMostOfPart = int64_t{1} << 31;  // values that 32 bits count

  DType dtype_;
  const void* data_;
  const Layout& layout_;
  int64_t columns_;
  Scratch<int32_t> lows_, highs_;
  LogSink sink_;

  // The groups [first, last) of the elements [begin, end).
  void walk(int64_t begin, int64_t end, const LogSink& whole, int64_t first, int64_t last) const {
    const LogHistogramTable& table = log_histogram_table();
    layout_.for_each_span(data_, element_size(dtype_), begin, end,
                          [&](const void* x, int64_t, int64_t n, int64_t offset, int64_t base) {
                            LogSink sink = whole;
                            sink.first = std::max<int64_t>(first - base, 0);
                            sink.last = std::min(last - base, layout_.channels);
                            if (sink.first >= sink.last) {
                              return;
                            }
                            sink.lows += base;
                            sink.highs += base;
                            if (sink.part == nullptr) {
                              sink.state += base * columns_;
                            } else {
                              sink.part += base * columns_;
                            }
                            table.count(dtype_, x, n, offset, sink);
                          });
  }

  // Few groups, of many values: each part has rows of its own.
  void run_parts(int64_t parts, int64_t cells) {
    const int64_t groups = layout_.groups;
    // odd in units of 128 bytes: copies a multiple of 4096 bytes apart would be in each other's way
    const int64_t stride = row_stride(cells, sizeof(uint32_t)) | 32;
    const int64_t keys = row_stride(groups, sizeof(int32_t));
    Scratch<uint32_t, 0> counts(parts * kCopies * stride);
    Scratch<int32_t> lows(parts * keys), highs(parts * keys);
    for_each_part(layout_.numel, parts, 64, [&](int64_t part, int64_t begin, int64_t end) {
      LogSink sink = sink_;
      sink.part = counts.data() + part * kCopies * stride;
      sink.spread = stride;
      sink.lows = lows.data() + part * keys;
      sink.highs = highs.data() + part * keys;
      std::fill_n(sink.part, kCopies * stride, 0u);
      std::fill_n(sink.lows, groups, kMostKey);
      std::fill_n(sink.highs, groups, kLeastKey);
      walk(begin, end, sink, 0, groups);
    });
    for_each_part(cells, part_count(cells * parts), 64, [&](int64_t, int64_t begin, int64_t end) {
      log_histogram_table().add(sink_.state + begin, counts.data() + begin, parts * kCopies, stride,
                                end - begin, layout_.repeat);
    });
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t group = 0; group < groups; ++group) {
        lows_[group] = std::min(lows_[group], lows[part * keys + group]);
        highs_[group] = std::max(highs_[group], highs[part * keys + group]);
      }
    }
  }

  // No two threads have a group in common: each takes elements that hold groups whole, or, where
  // these lie scattered, looks for its own among all elements.
  void run_groups(int64_t parts) {
    const int64_t groups = layout_.groups;
    if (layout_.border > 0 && layout_.numel / layout_.border >= std::min(groups, 4 * parts)) {
      for_each_part(layout_.numel, parts, layout_.border, [&](int64_t, int64_t begin, int64_t end) {
        walk(begin, end, sink_, 0, groups);
      });
    } else {
      for_each_part(groups, std::min(parts, groups), 1, [&](int64_t, int64_t first, int64_t last) {
        walk(0, layout_.numel, sink_, first, last);
      });
    }
  }
};

void log_histogram(const Tensor& x, const Tensor& counts, const Tensor& min_val,
                   const Tensor& max_val, std::optional<int64_t> axis, int64_t nonfinite_mode,
                   std::optional<Tensor> enabled, std::optional<std::vector<int64_t>> block_size) {
  const LogHistogramArgs args =
      parse_log_histogram(x, counts, min_val, max_val, axis, nonfinite_mode, block_size);
  if (is_off(kLogHistogram, "enabled", enabled, x) || x.numel() == 0) {
    return;
  }
  const void* data = x.const_data_ptr();
  if (args.nonfinite == Nonfinite::raise) {
    Range all;
    const int64_t count =
        group_ranges(args.dtype, data, Layout::of_reduction(x, {}), true, &all.low, &all.high);
    check_finite(kLogHistogram, args.nonfinite, count, x.numel());
  }
  const Layout layout = Layout::of_reduction(x, args.grouping);
  LogCount count(args.dtype, data, layout, args.bins, args.nonfinite == Nonfinite::propagate,
                 mutable_data<int64_t>(counts));
  count.run();
  float* lows = mutable_data<float>(min_val);
  float* highs = mutable_data<float>(max_val);
  for (int64_t i = 0; i < layout.groups; ++i) {
    const Range range = merge({lows[i], highs[i]}, count.range(i));
    lows[i] = range.low;
    highs[i] = range.high;
  }
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CPU, m) {
  m.impl("log_histogram", TORCH_BOX(&pyobserver::log_histogram));
}
