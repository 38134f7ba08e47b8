// The elements of a tensor over the threads of a grid: 16 bytes at a time where they lie in a row.
#pragma once

#include "cuda.h"
#include "device_layout.cuh"

namespace pyobserver {

// Elements cut for loads of 16 bytes: `head` before the first pack, the packs, and the rest.
struct Cut {
  int64_t size, head, packs;
};

// Of so many elements from x on, which lie in a row if in_row.
template <class T>
inline Cut cut_for_packs(const T* x, int64_t size, bool in_row) {
  const int64_t past = reinterpret_cast<uintptr_t>(x) % 16;
  const int64_t head = past == 0 ? 0 : (16 - past) / static_cast<int64_t>(sizeof(T));
  if (!in_row || past % sizeof(T) != 0 || head > size) {
    return {size, 0, 0};
  }
  return {size, head, (size - head) / Pack<T>::size};
}

template <class T, class Body>
PYOBS_DEVICE void take_pack(const Pack<T>& pack, const Body& body) {
  float values[Pack<T>::size];
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i) {
    values[i] = to_float(pack.values[i]);
  }
  body(values);
}

// Calls body with float arrays, of a size known when it is compiled, for the elements of a cut that
// fall to `thread` of so many, which waits for kInFlight loads of packs at once. place: where an
// element lies, in elements from x; those of a pack lie in a row.
template <int kInFlight, class T, class Place, class Body>
PYOBS_DEVICE void for_each_value(const T* __restrict__ x, const Cut& cut, int64_t thread,
                                 int64_t threads, const Place& place, const Body& body) {
  constexpr int kSize = Pack<T>::size;
  const auto pack_at = [&](int64_t i) {
    return *reinterpret_cast<const Pack<T>*>(x + place(cut.head + i * kSize));
  };
  int64_t next = thread;
  for (; next + (kInFlight - 1) * threads < cut.packs; next += kInFlight * threads) {
    Pack<T> packs[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      packs[k] = pack_at(next + k * threads);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      take_pack(packs[k], body);
    }
  }
  if constexpr (kInFlight > 1) {
#pragma unroll 1
    for (; next < cut.packs; next += threads) {
      take_pack(pack_at(next), body);
    }
  }
  const int64_t singles = cut.size - cut.packs * kSize;
#pragma unroll 1
  for (int64_t i = thread; i < singles; i += threads) {
    const float values[1] = {to_float(x[place(i < cut.head ? i : i + cut.packs * kSize)])};
    body(values);
  }
}

// Loads that a thread waits for at once: at least 16 values, but few where places have to be
// computed.
template <class T>
constexpr int kLoads = sizeof(T) == 2 ? 2 : 4;
constexpr int kScatteredLoads = 1;

// Of a whole tensor, for a grid.
template <class T, class Body>
PYOBS_DEVICE void for_each_value(const T* __restrict__ x, const DeviceLayout& layout,
                                 const Cut& cut, const Body& body) {
  if (layout.dense) {
    for_each_value<kLoads<T>>(
        x, cut, thread_of_grid(), threads_of_grid(), [](int64_t i) { return i; }, body);
  } else {
    for_each_value<kScatteredLoads>(
        x, Cut{layout.numel, 0, 0}, thread_of_grid(), threads_of_grid(),
        [&](int64_t i) { return place_of(layout, i); }, body);
  }
}

// The layout of x, which is copied where its axes are too many.
struct Walk {
  Tensor x;
  Layout host;
  DeviceLayout layout;

  Walk(const char* op, const Tensor& given, const Grouping& grouping)
      : x(given), host(Layout::of_reduction(x, grouping)) {
    if (!host.dense && host.walk_count() > DeviceLayout::kMostAxes) {
      x = torch::stable::contiguous(given);
      host = Layout::of_reduction(x, grouping);
    }
    layout = device_layout(op, host);
  }
};

// Blocks of a grid whose counters have 32 bits.
inline unsigned counting_blocks(int64_t elements, unsigned blocks) {
  constexpr int64_t kMostOfBlock = int64_t{1} << 31;
  return static_cast<unsigned>(std::max<int64_t>(blocks, elements / kMostOfBlock + 1));
}

// nonfinite="raise": how many values are not finite, read back before anything is written.

template <class T>
static __global__ void count_nonfinite(const T* x, DeviceLayout layout, Cut cut,
                                       DeviceSwitch enabled, unsigned long long* total) {
  if (is_off(enabled)) {
    return;
  }
  unsigned long long count = 0;
  for_each_value(x, layout, cut, [&](const auto& values) {
    for (const float value : values) {
      count += is_finite(value) ? 0 : 1;
    }
  });
  count =
      reduce_block(count, 0ull, [](unsigned long long a, unsigned long long b) { return a + b; });
  if (threadIdx.x == 0 && count > 0) {
    atomicAdd(total, count);
  }
}

inline void check_finite_on_device(const char* op, const CudaContext& cuda, DType dtype,
                                   const Tensor& x, const DeviceSwitch& enabled) {
  const Walk walk(op, x, {});
  const DeviceScratch scratch(x, sizeof(unsigned long long));
  auto* total = scratch.at<unsigned long long>(0);
  cuda.zero(total, sizeof(*total));
  constexpr int kThreads = 256;
  dispatch(dtype, walk.x.const_data_ptr(), [&](const auto* data) {
    const Cut cut = cut_for_packs(data, walk.layout.numel, walk.layout.dense);
    const unsigned blocks = cuda.blocks(walk.layout.numel, 16 * kThreads, 8);
    cuda.launch(count_nonfinite<typename Pointee<decltype(data)>::type>, blocks, kThreads, 0, data,
                walk.layout, cut, enabled, total);
  });
  const int64_t count = walk.layout.repeat * static_cast<int64_t>(cuda.read(total));
  check_finite(op, Nonfinite::raise, count, x.numel());
}

}  // namespace pyobserver
