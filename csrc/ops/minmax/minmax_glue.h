// The range of a whole tensor, over torch's threads; minmax and histogram both begin with it.
#pragma once

#include <vector>

#include "../../core/dense.h"
#include "minmax.h"

namespace pyobserver {

inline Range tensor_range(DType dtype, const DenseInput& input, bool finite_only,
                          int64_t* nonfinite) {
  const auto& table = minmax_table();
  const int64_t parts = part_count(input.inner);
  const auto* data = static_cast<const char*>(input.tensor.const_data_ptr());
  std::vector<Range> ranges(parts, empty_range());
  std::vector<int64_t> counts(parts);
  for_each_part(input.inner, parts, 64, [&](int64_t part, int64_t begin, int64_t end) {
    counts[part] = table.tensor(dtype, data + begin * element_size(dtype), end - begin, finite_only,
                                &ranges[part]);
  });
  Range range = empty_range();
  *nonfinite = 0;
  for (int64_t part = 0; part < parts; ++part) {
    range = merge(range, ranges[part]);
    *nonfinite += counts[part];
  }
  return range;
}

}  // namespace pyobserver
