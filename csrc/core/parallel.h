// Work over torch's threads, and the memory that a call needs for it.
#pragma once

#include <algorithm>
#include <memory>

#include "torch_api.h"

namespace pyobserver {

// Work is cut into equal parts, whose number and borders do not depend on what the parts hold.
constexpr int64_t kGrain = 32768;  // elements below which a thread costs more than it saves

inline int64_t part_count(int64_t elements) {
  if (elements < 2 * kGrain) {
    return 1;
  }
  const int64_t most = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min(most, elements / kGrain));
}

// Calls body(part, begin, end) for each part of [0, size), borders at multiples of `multiple`.
// body must not throw.
template <class Body>
inline void for_each_part(int64_t size, int64_t parts, int64_t multiple, const Body& body) {
  if (parts == 1) {
    body(int64_t{0}, int64_t{0}, size);
    return;
  }
  const int64_t units = (size + multiple - 1) / multiple;
  const int64_t length = (units + parts - 1) / parts * multiple;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = std::min(size, part * length);
      body(part, begin, std::min(size, begin + length));
    }
  });
}

// The distance of the rows of an array that threads write to, each its own: no two in a cache line.
inline int64_t row_stride(int64_t size, int64_t element_size) {
  const int64_t line = 128 / element_size;
  return (size + line - 1) / line * line;
}

// An array of a size known at run time; a small one costs no allocation. Not initialized.
template <class T, int64_t small = 64>
class Scratch {
 public:
  explicit Scratch(int64_t size) : large_(size > small ? new T[size] : nullptr) {}
  T* data() { return large_ ? large_.get() : small_; }
  T& operator[](int64_t index) { return data()[index]; }

 private:
  std::unique_ptr<T[]> large_;
  T small_[small > 0 ? small : 1];
};

}  // namespace pyobserver
