// CPU glue of learnable_clip, with and without the mask, and of its backward.
#include "learnable_clip.h"

#include "../../core/parallel.h"
#include "learnable_clip_glue.h"

namespace pyobserver {
namespace {

void check_bounds(const LearnableClipArgs& args, float low, float high) {
  check(low == low && high == high, kLearnableClip, ": low, high: expected numbers, got ", low,
        " and ", high);
  check(!args.grid.quantized || amax_of(low, high) >= 0, kLearnableClip,
        ": low, high: expected max(-low, high) of 0 or more, got ", low, " and ", high);
}

}  // namespace

Tensor learnable_clip_forward(const LearnableClipArgs& args) {
  const Tensor& x = args.x;
  const int64_t n = x.numel();
  const Layout layout = Layout::of_output(x, {});
  Tensor y = empty_output(x, layout.dense && n > 0);
  if (n == 0) {
    return y;
  }
  const ClipArgs call = {*const_data<float>(args.low), *const_data<float>(args.high), args.grid};
  check_bounds(args, call.low, call.high);
  const DType dtype = input_dtype(kLearnableClip, "x", x);
  const void* from = x.const_data_ptr();
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  const int64_t size = element_size(dtype);
  const auto& table = learnable_clip_table();
  const int64_t parts = part_count(n);
  Scratch<bool> negative(parts);
  for_each_part(n, parts, 64, [&](int64_t part, int64_t begin, int64_t end) {
    bool found = false;
    layout.for_each_span(from, size, begin, end,
                         [&](const void* span, int64_t first, int64_t count, int64_t, int64_t) {
                           found |= table.forward(dtype, span, to + first * size, args.mask, first,
                                                  count, call);
                         });
    negative[part] = found;
  });
  for (int64_t part = 0; part < parts; ++part) {
    check(!args.is_unsigned || !negative[part], kLearnableClip,
          ": x: expected no negative value after clipping for an unsigned grid, got one");
  }
  return y;
}

void learnable_clip_sums(const Tensor& grad, ClipBackward call, int64_t chunks, float* to_low,
                         float* to_high) {
  const DType dtype = input_dtype(kLearnableClipBackward, "grad", grad);
  Scratch<PairSums> sums(chunks);
  call.sums = sums.data();
  const auto& table = learnable_clip_table();
  for_each_part(
      chunks, std::min(part_count(call.n), chunks), 1,
      [&](int64_t, int64_t begin, int64_t end) { table.backward(dtype, call, begin, end); });
  const PairSums total = table.finish(call.sums, chunks);
  *to_low = static_cast<float>(total.first);
  *to_high = static_cast<float>(total.second);
}

}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CPU, m) {
  m.impl("_learnable_clip", TORCH_BOX(&pyobserver::learnable_clip));
  m.impl("_learnable_clip_mask", TORCH_BOX(&pyobserver::learnable_clip_mask));
  m.impl("_learnable_clip_backward", TORCH_BOX(&pyobserver::learnable_clip_backward));
}
