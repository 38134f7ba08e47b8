// CUDA glue of observe_fake_quantize, in two launches: minmax, whose last blocks choose scale and
// zero point too, and the fake-quantize. The tensor is read twice and written once; both switches
// are read on the device. Scales are not checked: that would be a device sync.
#include "../minmax/minmax_cuda.cuh"
#include "observe_fake_quantize_glue.h"

namespace pyobserver {

Tensor observe_fake_quantize_forward(const ObserveArgs& args) {
  const char* op = kObserveFakeQuantize;
  const FakeQuantizeArgs& given = args.fake_quantize;
  if (given.x.numel() > 0) {
    const DeviceSwitch enabled = device_switch(op, "observer_enabled", args.enabled, given.x);
    minmax_on_device(
        op, args.dtype, given.x, given.grouping, args.minmax, enabled,
        {args.qparams, mutable_data<float>(given.scale), given.zero_point.mutable_data_ptr()});
  }
  return fake_quantize_forward(op, given);
}

}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CUDA, m) {
  m.impl("_observe_fake_quantize", TORCH_BOX(&pyobserver::observe_fake_quantize));
  m.impl("_observe_fake_quantize_mask", TORCH_BOX(&pyobserver::observe_fake_quantize_mask));
}
