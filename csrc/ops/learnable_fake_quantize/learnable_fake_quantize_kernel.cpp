// CPU body of learnable_fake_quantize's backward, compiled once per instruction set.
#include "learnable_fake_quantize.h"

namespace pyobserver::PYOBS_ISA {
namespace {

template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

// The terms of the sums, an element each.
template <class Compute>
struct Terms {
  Compute scale[kLanes], zero_point[kLanes];
};

template <class Value>
PYOBS_HD void add(const Value* scale, const Value* zero_point, int64_t count, Lanes* lanes) {
  for (int64_t j = 0; j < count; ++j) {
    lanes->first[j] += static_cast<double>(scale[j]);
    lanes->second[j] += static_cast<double>(zero_point[j]);
  }
}

PYOBS_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

PYOBS_HD LearnedParams params_of(const LearnedBackward& args, int64_t group) {
  return learned_params(args.scale[group], args.zero_point[group], args.grid, args.least_scale);
}

PYOBS_HD void write(const LearnedBackward& args, int64_t group, int64_t chunk, PairSums sums) {
  if (args.walk.chunks > 1) {
    args.sums[group * args.walk.chunks + chunk] = sums;
  } else {
    args.grad_scale[group] = static_cast<float>(sums.first);
    args.grad_zero_point[group] = static_cast<float>(sums.second);
  }
}

// n elements of x, `stride` from each other in the walk, from element `first` of it on: in place
// where they lie in a row.
template <class T>
PYOBS_HD const T* take(const LearnedBackward& args, int64_t first, int64_t n, int64_t stride,
                       T* taken) {
  const T* x = static_cast<const T*>(args.x);
  if (args.dense && stride == 1) {
    return x + first;
  }
  for (int64_t j = 0; j < n; ++j) {
    int64_t index = first + j * stride;
    int64_t place = args.dense ? index : 0;
    for (int axis = args.dense ? -1 : args.axes - 1; axis >= 0; --axis) {
      place += index % args.places[axis].size * args.places[axis].step;
      index /= args.places[axis].size;
    }
    taken[j] = x[place];
  }
  return taken;
}

// n elements of one quantizer.
template <class T, class Compute>
PYOBS_HD void terms_of_run(const T* x, const T* grad, T* grad_x, int64_t n, LearnedParams params,
                           QuantGrid grid, float grad_factor, Compute* scale, Compute* zero_point) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    const auto found =
        learned_grads<Compute>(widen(x[j]), widen(grad[j]), params, grid, grad_factor);
    store(static_cast<double>(found.x), &grad_x[j]);
    scale[j] = found.scale;
    zero_point[j] = found.zero_point;
  }
}

template <class T>
void backward_long(const LearnedBackward& args, int64_t begin, int64_t end) {
  using Compute = typename ComputeOf<T>::type;
  const GroupWalk& walk = args.walk;
  const int64_t inner = walk.own_count > 0 ? walk.own[0].size : 1;
  const T* grad = static_cast<const T*>(args.grad);
  T* grad_x = static_cast<T*>(args.grad_x);
  Lanes lanes;
  Terms<Compute> terms;
  T taken[kLanes];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t group = unit / walk.chunks;
    const int64_t chunk = unit % walk.chunks;
    const LearnedParams params = params_of(args, group);
    const int64_t base = first_of_group(walk, group);
    const int64_t last = least(walk.members, (chunk + 1) * walk.chunk);
    const int64_t used = lanes_of(last - chunk * walk.chunk);
    clear(&lanes, used);
    for (int64_t row = chunk * walk.chunk; row < last; row += kLanes) {
      const int64_t count = least(kLanes, last - row);
      for (int64_t j = 0; j < count;) {
        const int64_t n = least(count - j, inner - (row + j) % inner);
        const int64_t first = base + place_of_member(walk, row + j);
        const T* x = take(args, first, n, 1, taken);
        terms_of_run(x, grad + first, grad_x + first, n, params, args.grid, args.grad_factor,
                     terms.scale + j, terms.zero_point + j);
        j += n;
      }
      add(terms.scale, terms.zero_point, count, &lanes);
    }
    write(args, group, chunk, fold(&lanes, used));
  }
}

// n elements of as many quantizers, `stride` from each other.
template <class T, class Compute>
PYOBS_HD void terms_of_row(const T* x, const T* grad, T* grad_x, int64_t n, int64_t stride,
                           const LearnedParams* params, QuantGrid grid, float grad_factor,
                           Compute* scale, Compute* zero_point) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    const auto found =
        learned_grads<Compute>(widen(x[j]), widen(grad[j * stride]), params[j], grid, grad_factor);
    store(static_cast<double>(found.x), &grad_x[j * stride]);
    scale[j] = found.scale;
    zero_point[j] = found.zero_point;
  }
}

// Groups next to each other, together.
template <class T>
void backward_short(const LearnedBackward& args, int64_t begin, int64_t end) {
  using Compute = typename ComputeOf<T>::type;
  const GroupWalk& walk = args.walk;
  const bool beside = walk.over_count > 0 && walk.over[0].group == 1;
  const int64_t neighbours = beside ? walk.over[0].size : 1;
  const int64_t stride = beside ? walk.over[0].step : 1;
  const T* grad = static_cast<const T*>(args.grad);
  T* grad_x = static_cast<T*>(args.grad_x);
  Lanes lanes;
  Terms<Compute> terms;
  LearnedParams params[kLanes];
  T taken[kLanes];
  for (int64_t unit = begin; unit < end;) {
    const int64_t group = unit % walk.groups;
    const int64_t chunk = unit / walk.groups;
    const int64_t n = least(least(kLanes, end - unit), neighbours - group % neighbours);
    for (int64_t j = 0; j < n; ++j) {
      params[j] = params_of(args, group + j);
    }
    const int64_t base = first_of_group(walk, group);
    const int64_t last = least(walk.members, (chunk + 1) * walk.chunk);
    clear(&lanes, n);
    for (int64_t e = chunk * walk.chunk; e < last; ++e) {
      const int64_t first = base + place_of_member(walk, e);
      const T* x = take(args, first, n, stride, taken);
      if (stride == 1) {
        terms_of_row(x, grad + first, grad_x + first, n, 1, params, args.grid, args.grad_factor,
                     terms.scale, terms.zero_point);
      } else {
        terms_of_row(x, grad + first, grad_x + first, n, stride, params, args.grid,
                     args.grad_factor, terms.scale, terms.zero_point);
      }
      add(terms.scale, terms.zero_point, n, &lanes);
    }
    for (int64_t j = 0; j < n; ++j) {
      write(args, group + j, chunk, {lanes.first[j], lanes.second[j]});
    }
    unit += n;
  }
}

void backward_any(DType dtype, const LearnedBackward& args, int64_t begin, int64_t end) {
  dispatch(dtype, args.x, [&](const auto* typed) {
    using T = typename Pointee<decltype(typed)>::type;
    if (args.walk.short_runs) {
      backward_short<T>(args, begin, end);
    } else {
      backward_long<T>(args, begin, end);
    }
  });
}

void finish_any(const LearnedBackward& args, int64_t begin, int64_t end) {
  const int64_t chunks = args.walk.chunks;
  for (int64_t group = begin; group < end; ++group) {
    const PairSums total = total_of_chunks(args.sums + group * chunks, chunks);
    args.grad_scale[group] = static_cast<float>(total.first);
    args.grad_zero_point[group] = static_cast<float>(total.second);
  }
}

}  // namespace

extern const LearnableTable learnable_table = {backward_any, finish_any};

}  // namespace pyobserver::PYOBS_ISA
