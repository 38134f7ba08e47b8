// CUDA kernels and glue of learnable_fake_quantize: its backward in one launch, which reads x and
// the gradient once and writes the gradient of x. The sums of chunks stay on the device, 16 bytes
// each; the last block adds those of a group. The order is that of learnable_fake_quantize.h.
//
// Long runs: a warp, or a part of one where a group has few elements, takes a chunk, lane after
// lane in a row, eight elements a thread in flight. Short runs: a thread takes a chunk, its
// neighbours the same rows of the next groups.
#include <type_traits>

#include "../../core/cuda.h"
#include "../../core/device_layout.cuh"
#include "../../core/lane_sums.cuh"
#include "learnable_fake_quantize_glue.h"

namespace pyobserver {
namespace {

constexpr int kThreads = kLanes;
constexpr int kBlocksPerMultiprocessor = 16;

// Where the members of a chunk lie in the walk, without a division of 64 bits for each: of a walk
// that is that of memory, whose groups span two axes at most.
struct NearMembers {
  Divisor by_first;
  bool long_runs;  // a chunk comes to the end of one at most
  int64_t size;    // of the first axis
};
// Of any layout.
struct AnyMembers {
  DeviceLayout layout;
};

struct NearPlaces {
  const GroupWalk& walk;
  const NearMembers& members;
  int64_t base, begin, within, next;  // begin is element `within` of run `next`

  __device__ __forceinline__ NearPlaces(const GroupWalk& walk_, const NearMembers& members_,
                                        int64_t base_, int64_t begin_)
      : walk(walk_), members(members_), base(base_), begin(begin_) {
    next = begin / members.size;
    within = begin - next * members.size;
  }
  __device__ __forceinline__ int64_t of(int64_t e) const {
    const int64_t from_run = within + (e - begin);
    const int64_t runs = members.long_runs
                             ? from_run >= members.size
                             : members.by_first.divide(static_cast<uint32_t>(from_run));
    return base + (from_run - runs * members.size) * walk.own[0].step +
           (next + runs) * walk.own[1].step;
  }
  __device__ __forceinline__ int64_t of_x(int64_t place) const { return place; }
};

struct AnyPlaces {
  const GroupWalk& walk;
  const AnyMembers& members;
  int64_t base;

  __device__ __forceinline__ AnyPlaces(const GroupWalk& walk_, const AnyMembers& members_,
                                       int64_t base_, int64_t)
      : walk(walk_), members(members_), base(base_) {}
  __device__ __forceinline__ int64_t of(int64_t e) const { return base + place_of_member(walk, e); }
  __device__ __forceinline__ int64_t of_x(int64_t place) const {
    return place_of(members.layout, place);
  }
};

template <class Members>
struct PlacesOf;
template <>
struct PlacesOf<NearMembers> {
  using type = NearPlaces;
};
template <>
struct PlacesOf<AnyMembers> {
  using type = AnyPlaces;
};

template <class T>
struct Element {
  T x, grad;
  int64_t place;
};

template <class T, class Places>
PYOBS_DEVICE Element<T> load_element(const LearnedBackward& args, const Places& places, int64_t e) {
  const int64_t place = places.of(e);
  return {static_cast<const T*>(args.x)[places.of_x(place)],
          static_cast<const T*>(args.grad)[place], place};
}

template <class T>
PYOBS_DEVICE PairSums quantize_gradient(const LearnedBackward& args, const Element<T>& element,
                                        const LearnedParams& params, bool off) {
  if (off) {
    static_cast<T*>(args.grad_x)[element.place] = element.grad;
    return {0.0, 0.0};
  }
  const auto found = learned_grads(widen_fast(element.x), widen_fast(element.grad), params,
                                   args.grid, args.grad_factor);
  narrow_fast(found.x, &static_cast<T*>(args.grad_x)[element.place]);
  return {static_cast<double>(found.scale), static_cast<double>(found.zero_point)};
}

// As they lie on the device.
struct Switches {
  DeviceSwitch enabled, held;
};

PYOBS_DEVICE void write_group(const LearnedBackward& args, const Switches& switches, int64_t group,
                              const PairSums& sums) {
  const bool held = switches.held.flag != nullptr && !is_off(switches.held);
  args.grad_scale[group] = held ? 0.0f : static_cast<float>(sums.first);
  args.grad_zero_point[group] = held ? 0.0f : static_cast<float>(sums.second);
}

PYOBS_DEVICE void write(const LearnedBackward& args, const Switches& switches, int64_t group,
                        int64_t chunk, const PairSums& sums) {
  if (args.walk.chunks > 1) {
    args.sums[group * args.walk.chunks + chunk] = sums;
  } else {
    write_group(args, switches, group, sums);
  }
}

PYOBS_DEVICE void finish(const LearnedBackward& args, const Switches& switches,
                         unsigned* finished) {
  finish_sums(
      args.sums, args.walk.groups, args.walk.chunks, finished,
      [&](int64_t group, const PairSums& total) { write_group(args, switches, group, total); });
}

// width: threads of a chunk, a power of two.
template <class T, class Members>
__global__ void __launch_bounds__(kThreads)
    long_kernel(LearnedBackward args, Switches switches, Members members, int width,
                unsigned* finished) {
  constexpr bool kNear = std::is_same<Members, NearMembers>::value;
  const GroupWalk& walk = args.walk;
  const int64_t units = walk.groups * walk.chunks;
  const int lane = threadIdx.x % width;
  const bool off = is_off(switches.enabled);
  const int64_t step = threads_of_grid() / width;
  // the units of a warp, so that all its lanes come to every shuffle
  for (int64_t of_warp = thread_of_grid() / kWarp * (kWarp / width); of_warp < units;
       of_warp += step) {
    const int64_t unit = of_warp + threadIdx.x % kWarp / width;
    const bool valid = unit < units;
    const int64_t group = valid ? unit / walk.chunks : 0;
    const int64_t chunk = valid ? unit - group * walk.chunks : 0;
    const LearnedParams params =
        learned_params(args.scale[group], args.zero_point[group], args.grid, args.least_scale);
    const int64_t begin = chunk * walk.chunk;
    const int64_t most = begin + walk.chunk < walk.members ? begin + walk.chunk : walk.members;
    const typename PlacesOf<Members>::type places(walk, members, first_of_group(walk, group),
                                                  begin);
    const PairSums sums = sum_lanes<kNear>(
        width, lane, begin, valid ? most : begin,
        [&](int64_t e) { return load_element<T>(args, places, e); },
        [&](const Element<T>& element) { return quantize_gradient(args, element, params, off); });
    if (valid && lane == 0) {
      write(args, switches, group, chunk, sums);
    }
  }
  finish(args, switches, finished);
}

template <class T, class Members>
__global__ void __launch_bounds__(kThreads)
    short_kernel(LearnedBackward args, Switches switches, Members members, unsigned* finished) {
  constexpr int kAtOnce = std::is_same<Members, NearMembers>::value ? kFlight : 1;
  const GroupWalk& walk = args.walk;
  const int64_t units = walk.groups * walk.chunks;
  const bool off = is_off(switches.enabled);
  for (int64_t unit = thread_of_grid(); unit < units; unit += threads_of_grid()) {
    const int64_t chunk = unit / walk.groups;
    const int64_t group = unit - chunk * walk.groups;
    const LearnedParams params =
        learned_params(args.scale[group], args.zero_point[group], args.grid, args.least_scale);
    const int64_t begin = chunk * walk.chunk;
    const int64_t end = begin + walk.chunk < walk.members ? begin + walk.chunk : walk.members;
    const typename PlacesOf<Members>::type places(walk, members, first_of_group(walk, group),
                                                  begin);
    PairSums sums = {0.0, 0.0};
    for (int64_t row = begin; row < end; row += kAtOnce) {
      Element<T> elements[kAtOnce];
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s) {
        elements[s] = load_element<T>(args, places, row + s < end ? row + s : begin);
      }
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s) {
        if (row + s < end) {
          sums = plus(sums, quantize_gradient(args, elements[s], params, off));
        }
      }
    }
    write(args, switches, group, chunk, sums);
  }
  finish(args, switches, finished);
}

// Threads of a chunk: a warp, or so many that a group's elements are at most kFlight of each.
int width_of(const GroupWalk& walk) {
  int width = 1;
  while (width < kWarp && int64_t{kFlight} * width < walk.members) {
    width *= 2;
  }
  return width;
}

NearMembers near_members(const GroupWalk& walk) {
  constexpr int64_t kLong = int64_t{1} << 30;
  const int64_t size = walk.own_count > 0 ? walk.own[0].size : 1;
  return {Divisor(size < kLong ? size : 1), size >= kLong, size};
}

}  // namespace

void learnable_backward(DType dtype, const LearnableArgs& args, const Layout& layout,
                        const LearnableGrads& grads) {
  LearnedBackward call = learned_args(dtype, args, layout, grads);
  const GroupWalk& walk = call.walk;
  const Switches switches = {device_switch(kLearnableBackward, "enabled", args.enabled, args.x),
                             device_switch(kLearnableBackward, "held", args.held, args.x)};
  const CudaContext cuda(kLearnableBackward, args.x);
  const int64_t chunks = walk.groups * walk.chunks;
  std::optional<DeviceScratch> scratch;
  unsigned* finished = nullptr;
  if (walk.chunks > 1) {
    const int64_t bytes = chunks * static_cast<int64_t>(sizeof(PairSums));
    scratch.emplace(args.x, bytes + static_cast<int64_t>(sizeof(unsigned)));
    call.sums = scratch->at<PairSums>(0);
    finished = scratch->at<unsigned>(bytes);
    cuda.zero(finished, sizeof(unsigned));
  }
  const int width = width_of(walk);
  const unsigned blocks =
      cuda.blocks(walk.short_runs ? chunks : chunks * width, kThreads, kBlocksPerMultiprocessor);
  dispatch(dtype, call.x, [&](const auto* from) {
    using T = typename Pointee<decltype(from)>::type;
    const auto launch = [&](const auto& members) {
      using Members = typename std::decay<decltype(members)>::type;
      if (walk.short_runs) {
        cuda.launch(short_kernel<T, Members>, blocks, kThreads, 0, call, switches, members,
                    finished);
      } else {
        cuda.launch(long_kernel<T, Members>, blocks, kThreads, 0, call, switches, members, width,
                    finished);
      }
    };
    if (layout.dense && walk.own_count <= 2) {
      launch(near_members(walk));
    } else {
      launch(AnyMembers{device_layout(kLearnableBackward, layout)});
    }
  });
}

}  // namespace pyobserver

STABLE_TORCH_LIBRARY_IMPL(pyobserver, CUDA, m) {
  m.impl("_learnable_fake_quantize", TORCH_BOX(&pyobserver::learnable));
  m.impl("_learnable_fake_quantize_backward", TORCH_BOX(&pyobserver::learnable_backward_op));
}
