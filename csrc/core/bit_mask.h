// One bit an element, in the order of the output's memory. For kernel sources alone.
#pragma once

#include <stdint.h>

#include "dtype.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pyobserver::PYOBS_ISA {

constexpr int64_t kBlock = 512;  // elements whose flags are gathered before they are packed

// Packs n flags of 0 or 1 to bits from bit `bit` of a byte on; n ends at a byte's end, or is less.
PYOBS_HD void pack_bits(uint8_t* flags, int64_t n, int bit, uint8_t* bytes) {
  if (bit != 0) {
    for (int64_t i = 0; i < n; ++i) {
      bytes[0] = static_cast<uint8_t>(bytes[0] | flags[i] << (bit + i));
    }
    return;
  }
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + 32 <= n; i += 32) {
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(flags + i));
    const auto bits = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(values, 7)));
    __builtin_memcpy(bytes + i / 8, &bits, sizeof(bits));
  }
#endif
#if defined(__SSE2__)
  for (; i + 16 <= n; i += 16) {
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(flags + i));
    const auto bits = static_cast<uint16_t>(_mm_movemask_epi8(_mm_slli_epi16(values, 7)));
    __builtin_memcpy(bytes + i / 8, &bits, sizeof(bits));
  }
#endif
  for (; i < n; i += 8) {
    uint32_t byte = 0;
    for (int64_t j = i; j < n && j < i + 8; ++j) {
      byte |= static_cast<uint32_t>(flags[j]) << (j - i);
    }
    bytes[i / 8] = static_cast<uint8_t>(byte);
  }
}

// The other way round, from the first bit of a byte on: writes a flag for each bit of the bytes
// that n elements have.
PYOBS_HD void unpack_bits(const uint8_t* bytes, int64_t n, uint8_t* flags) {
  for (int64_t i = 0; i * 8 < n; ++i) {
    const uint64_t each = bytes[i] * 0x0101010101010101u & 0x8040201008040201u;
    const uint64_t found = (each + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
    __builtin_memcpy(flags + i * 8, &found, sizeof(found));
  }
}

// Calls body(begin, count, flags) for blocks of [0, n), and packs their flags.
template <class Body>
PYOBS_HD void for_each_block(int64_t n, int64_t first, uint8_t* mask, const Body& body) {
  uint8_t flags[kBlock];
  for (int64_t begin = 0; begin < n;) {
    const int bit = static_cast<int>((first + begin) % 8);
    const int64_t most = bit == 0 ? kBlock : 8 - bit;  // until a byte is full
    const int64_t count = most < n - begin ? most : n - begin;
    body(begin, count, flags);
    if (mask != nullptr) {
      pack_bits(flags, count, bit, mask + (first + begin) / 8);
    }
    begin += count;
  }
}

}  // namespace pyobserver::PYOBS_ISA
