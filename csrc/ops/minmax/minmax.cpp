// CPU glue of minmax.
#include "minmax.h"

#include <optional>
#include <vector>

#include "minmax_glue.h"

namespace pyobserver {
namespace {

constexpr const char* kOp = "minmax";

void minmax(const Tensor& x, const Tensor& min_val, const Tensor& max_val,
            const Tensor& nonfinite_count, std::optional<int64_t> axis, int64_t update,
            double averaging_constant, int64_t nonfinite, std::optional<Tensor> enabled,
            std::optional<std::vector<int64_t>> block_size) {
  const DType dtype = input_dtype(kOp, "x", x);
  const Grouping grouping = parse_grouping(kOp, x, axis, block_size);
  const MinmaxArgs args = parse_minmax(kOp, x, min_val, max_val, nonfinite_count, grouping, update,
                                       averaging_constant, nonfinite);
  if (is_off(kOp, "enabled", enabled, x) || x.numel() == 0) {
    return;
  }
  MinmaxChange change(kOp, dtype, x, grouping, args);
  change.commit();
}

}  // namespace
}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CPU, m) { m.impl("minmax", TORCH_BOX(&pyobserver::minmax)); }
