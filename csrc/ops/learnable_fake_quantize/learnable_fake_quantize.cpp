// CPU glue of learnable_fake_quantize and of its backward.
#include "learnable_fake_quantize.h"

#include <algorithm>
#include <cstring>

#include "../../core/parallel.h"
#include "learnable_fake_quantize_glue.h"

namespace pyobserver {

void learnable_backward(DType dtype, const LearnableArgs& args, const Layout& layout,
                        const LearnableGrads& grads) {
  LearnedBackward call = learned_args(dtype, args, layout, grads);
  const GroupWalk& walk = call.walk;
  const auto set_to_zero = [&] {
    std::fill_n(call.grad_scale, walk.groups, 0.0f);
    std::fill_n(call.grad_zero_point, walk.groups, 0.0f);
  };
  if (is_off(kLearnableBackward, "enabled", args.enabled, args.x)) {
    std::memcpy(call.grad_x, call.grad, layout.numel * element_size(dtype));
    set_to_zero();
    return;
  }
  if (args.least_scale == 0.0) {
    check_learned_values(kLearnableBackward, call.scale, call.zero_point, walk.groups);
  }
  std::vector<GroupAxis> places;
  for (int i = 0; !layout.dense && i < layout.walk_count(); ++i) {
    places.push_back({layout.walk()[i].size, layout.walk()[i].stride, 0});
  }
  call.places = places.data();
  call.axes = static_cast<int>(places.size());
  const int64_t chunks = walk.groups * walk.chunks;
  Scratch<PairSums> sums(walk.chunks > 1 ? chunks : 0);
  call.sums = sums.data();
  const auto& table = learnable_table();
  const int64_t parts = std::min(part_count(layout.numel), chunks);
  for_each_part(chunks, parts, 1, [&](int64_t, int64_t begin, int64_t end) {
    table.backward(dtype, call, begin, end);
  });
  if (walk.chunks > 1) {
    table.finish(call, 0, walk.groups);
  }
  if (args.held.has_value() && !is_off(kLearnableBackward, "held", args.held, args.x)) {
    set_to_zero();
  }
}

}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CPU, m) {
  m.impl("_learnable_fake_quantize", TORCH_BOX(&pyobserver::learnable));
  m.impl("_learnable_fake_quantize_backward", TORCH_BOX(&pyobserver::learnable_backward_op));
}
