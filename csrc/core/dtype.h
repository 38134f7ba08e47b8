// The element types of the kernels, and their conversion to and from float. Torch-free, host and
// device. Everything here has internal linkage: the kernels are compiled once per instruction set,
// and a shared inline function could carry one set's code into another.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define PYOBS_HD static __host__ __device__ __forceinline__
#define PYOBS_HD_LARGE static __host__ __device__ inline
#define PYOBS_HD_CALLED static __host__ __device__ __noinline__
#else
#define PYOBS_HD static inline __attribute__((always_inline))
#define PYOBS_HD_LARGE static inline  // what need not be inlined
#define PYOBS_HD_CALLED PYOBS_HD      // what a device calls, as it is large there
#endif

namespace pyobserver {

enum class DType { float32, float64, float16, bfloat16 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

PYOBS_HD float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

PYOBS_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

PYOBS_HD float to_float(float value) { return value; }
PYOBS_HD float to_float(double value) { return static_cast<float>(value); }
PYOBS_HD float to_float(BFloat16 value) { return bits_to_float(uint32_t{value.bits} << 16); }

// Branch-free, so that it vectorizes: a subnormal half is its mantissa times 2^-24.
PYOBS_HD float to_float(Half value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t rebias = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;  // inf, NaN : finite
  const uint32_t normal = (magnitude << 13) + rebias;
  const uint32_t subnormal =
      float_to_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return bits_to_float(sign | (magnitude < 0x0400u ? subnormal : normal));
}

PYOBS_HD void from_float(float value, float* out) { *out = value; }
PYOBS_HD void from_float(float value, double* out) { *out = static_cast<double>(value); }

// Round to nearest even; a NaN keeps its sign and becomes quiet.
PYOBS_HD void from_float(float value, BFloat16* out) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x0040u;
  out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

PYOBS_HD void from_float(float value, Half* out) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // normal halves: drop 13 bits, round to nearest even; 0x47800000 is 65536
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // subnormal halves: adding 0.5 leaves the rounded mantissa in the low bits
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out->bits = static_cast<uint16_t>(sign | half);
}

PYOBS_HD bool is_finite(float value) { return (float_to_bits(value) & 0x7f800000u) != 0x7f800000u; }

template <class Pointer>
struct Pointee;
template <class T>
struct Pointee<const T*> {
  using type = T;
};

// Calls body with x as a pointer of its element type, which body knows as
// Pointee<decltype(x)>::type.
template <class Body>
static inline auto dispatch(DType dtype, const void* x, const Body& body) {
  switch (dtype) {
    case DType::float64:
      return body(static_cast<const double*>(x));
    case DType::float16:
      return body(static_cast<const Half*>(x));
    case DType::bfloat16:
      return body(static_cast<const BFloat16*>(x));
    default:
      return body(static_cast<const float*>(x));
  }
}

PYOBS_HD int64_t element_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

}  // namespace pyobserver
