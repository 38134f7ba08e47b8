// The only include of torch: its stable ABI, so that one build serves every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace pyobserver {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

}  // namespace pyobserver
