// Vectors of integers in the width of the instruction set being compiled, as the compilers'
// vector types: arithmetic and comparisons are written as of scalars. For kernel sources alone.
#pragma once

#include <stdint.h>

#include "dtype.h"
#include "sums.h"

namespace pyobserver::PYOBS_ISA {

// 512 bits would bring nothing to loops that wait for memory
#if defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T half __attribute__((vector_size(16)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
typedef uint64_t Words __attribute__((vector_size(16)));

template <class T>
PYOBS_HD Vector<T> load_vector(const void* from) {
  Vector<T> value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

template <class T>
PYOBS_HD T minimum(T a, T b) {
  return a < b ? a : b;
}
template <class T>
PYOBS_HD T maximum(T a, T b) {
  return a > b ? a : b;
}

// The lanes of a vector taken together by op, which is commutative and associative.
template <class T, class Op>
PYOBS_HD T fold_lanes(const Vector<T>& vector, const Op& op) {
  using Half = typename VectorOf<T>::half;
  Half halves[kVectorBytes / 16];
  __builtin_memcpy(halves, &vector, sizeof(halves));
  Half folded = kVectorBytes == 32 ? op(halves[0], halves[kVectorBytes / 32]) : halves[0];
  // casts of vectors keep the bits
  const Words words = (Words)folded;
  folded = op(folded, (Half)Words{words[1], words[1]});
  for (int bits = 32; bits >= static_cast<int>(8 * sizeof(T)); bits /= 2) {
    folded = op(folded, (Half)((Words)folded >> bits));
  }
  return folded[0];
}

}  // namespace pyobserver::PYOBS_ISA
