// pyobserver._autograd: what autograd does around the ops, in C++: a call with a gradient costs
// a third of what it costs through a Python autograd.Function.
//
// The stable ABI has no autograd, so this is built against torch's C++ API, for the one version of
// torch that was there: under another it is not loaded, and the Python Functions serve.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_strided.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using c10::IValue;
using c10::OperatorHandle;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

OperatorHandle find(const std::string& space, const std::string& op) {
  return c10::Dispatcher::singleton().findSchemaOrThrow((space + "::" + op).c_str(), "");
}

// A derivative of an op: an op of its own, which autograd calls. They live as long as the process.
struct Gradient {
  std::string function;     // the public function, for messages
  OperatorHandle forward;   // what to run where a gradient is needed
  OperatorHandle backward;  // (gradient of the first result, saved ...) -> gradients
};

// What a backward returns where it is to be differentiated itself.
struct Refused : torch::autograd::Function<Refused> {
  static Tensor forward(AutogradContext* ctx, const Tensor& /*grad*/, const Tensor& result,
                        const std::string& function) {
    ctx->saved_data["function"] = function;
    return result.alias();
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& /*grads*/) {
    TORCH_CHECK(false, ctx->saved_data["function"].toStringRef(),
                ": cannot be differentiated twice: its backward has no derivative");
  }
};

void keep(AutogradContext* ctx, const Gradient& gradient, const Tensor& output) {
  ctx->set_materialize_grads(false);
  ctx->saved_data["gradient"] = reinterpret_cast<int64_t>(&gradient);
  if (!output.is_contiguous()) {
    ctx->saved_data["strides"] = output.sym_strides().vec();
  }
}

const Gradient& kept(AutogradContext* ctx) {
  return *reinterpret_cast<const Gradient*>(ctx->saved_data["gradient"].toInt());
}

// The gradient laid out as the output was: the kernels read it in the order of that memory.
Tensor laid_out(AutogradContext* ctx, const Tensor& grad) {
  const auto found = ctx->saved_data.find("strides");
  if (found == ctx->saved_data.end()) {
    return grad.contiguous();
  }
  const auto strides = found->second.toSymIntVector();
  if (grad.sym_strides() == c10::SymIntArrayRef(strides)) {
    return grad;
  }
  return at::empty_strided_symint(grad.sym_sizes(), strides, grad.options()).copy_(grad);
}

// The forward op's last result is the mask, all that the backward needs.
struct Masked : torch::autograd::Function<Masked> {
  static Tensor forward(AutogradContext* ctx, const Tensor& /*x*/, const Gradient& gradient,
                        Stack* stack) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    gradient.forward.callBoxed(*stack);
    ctx->save_for_backward({stack->back().toTensor()});
    stack->pop_back();
    const auto results = gradient.forward.schema().returns().size() - 1;
    Tensor y = torch::jit::peek(*stack, 0, results).toTensor();
    keep(ctx, gradient, y);
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(3);
    if (grads[0].defined()) {
      const Gradient& gradient = kept(ctx);
      const Tensor grad = laid_out(ctx, grads[0]);
      Stack stack{grad, ctx->get_saved_variables()[0]};
      gradient.backward.callBoxed(stack);
      result[0] = stack[0].toTensor();
      if (at::GradMode::is_enabled() && grad.requires_grad()) {
        result[0] = Refused::apply(grad, result[0], gradient.function);
      }
    }
    return result;
  }
};

// Autograd's part of one op: the version counters of what it updates, and the gradient if it has
// one.
class Autograd final : public c10::OperatorKernel {
 public:
  Autograd(const OperatorHandle& op, const Gradient* gradient) : gradient_(gradient) {
    const auto& arguments = op.schema().arguments();
    count_ = arguments.size();
    for (size_t i = 0; i < count_; ++i) {
      const auto* alias = arguments[i].alias_info();
      if (alias != nullptr && alias->isWrite()) {
        updated_.push_back(i);
      }
    }
  }

  void operator()(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    c10::SmallVector<Tensor, 5> updated;
    for (const size_t i : updated_) {
      updated.push_back(torch::jit::peek(*stack, i, count_).toTensor());
    }
    run(op, keys, stack);
    for (const Tensor& each : updated) {
      if (!each.is_inference()) {
        each.unsafeGetTensorImpl()->bump_version();
      }
    }
  }

 private:
  void run(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) const {
    if (gradient_ != nullptr) {
      const Tensor x = torch::jit::peek(*stack, 0, count_).toTensor();
      TORCH_CHECK(!torch::autograd::isFwGradDefined(x), gradient_->function,
                  ": forward-mode differentiation is not served");
      if (at::GradMode::is_enabled() && x.requires_grad()) {
        Tensor y = Masked::apply(x, *gradient_, stack);
        const auto results = op.schema().returns().size();
        torch::jit::peek(*stack, 0, results) = std::move(y);
        return;
      }
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
  }

  const Gradient* gradient_;
  size_t count_;
  std::vector<size_t> updated_;
};

void implement(const std::string& space, const std::string& op, const Gradient* gradient) {
  auto* library = new torch::Library(torch::Library::IMPL, space, c10::DispatchKey::Autograd,
                                     __FILE__, __LINE__);
  library->impl(op.c_str(), torch::CppFunction::makeFromBoxedFunctor(
                                std::make_unique<Autograd>(find(space, op), gradient)));
}

}  // namespace

PYBIND11_MODULE(_autograd, m) {
  namespace py = pybind11;
  m.doc() = "Autograd of pyobserver's ops in C++.";
  m.def(
      "implement",
      [](const std::string& space, const std::string& op) { implement(space, op, nullptr); },
      py::arg("namespace"), py::arg("op"),
      "Count the updates of an op's arguments, as torch's own ops do.");
  m.def(
      "implement_masked",
      [](const std::string& space, const std::string& op, const std::string& forward,
         const std::string& backward) {
        const auto function = op.substr(op[0] == '_');
        implement(space, op, new Gradient{function, find(space, forward), find(space, backward)});
      },
      py::arg("namespace"), py::arg("op"), py::arg("forward"), py::arg("backward"),
      "As implement(), with a gradient of the first argument: where it is needed `forward` runs,\n"
      "whose last result is kept, and `backward(gradient, kept)` gives it.");
}
