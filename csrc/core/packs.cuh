// What a thread loads and stores of an elementwise op: packs of 16 bytes, of which the last may lie
// over the end, and one bit an element.
#pragma once

#include "device.cuh"

namespace pyobserver {

template <class T>
PYOBS_DEVICE Pack<T> load_pack(const T* from, int64_t n, bool aligned) {
  Pack<T> pack = {};
  if (aligned && n >= Pack<T>::size) {
    return *reinterpret_cast<const Pack<T>*>(from);
  }
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i) {
    if (i < n) {
      pack.values[i] = from[i];
    }
  }
  return pack;
}

template <class T>
PYOBS_DEVICE void store_pack(const Pack<T>& pack, T* to, int64_t n, bool aligned) {
  if (aligned && n >= Pack<T>::size) {
    *reinterpret_cast<Pack<T>*>(to) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i) {
    if (i < n) {
      to[i] = pack.values[i];
    }
  }
}

// All lanes of a warp call it, with the packs of elements that follow one another.
template <int size>
PYOBS_DEVICE void store_mask(uint8_t* mask, int64_t first, int64_t n, uint32_t bits) {
  bits <<= first % 8;
#pragma unroll
  for (int lanes = 1; lanes < 8 / size; lanes *= 2) {
    bits |= __shfl_xor_sync(kAllLanes, bits, lanes);
  }
  if (first % 8 == 0 && first < n) {
    mask[first / 8] = static_cast<uint8_t>(bits);
  }
}

}  // namespace pyobserver
