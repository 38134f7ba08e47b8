// pyobserver._autograd: what autograd does around the ops, in C++: a call with a gradient costs
// a third of what it costs through a Python autograd.Function.
//
// The stable ABI has no autograd, so this is built against torch's C++ API, for the one version of
// torch that was there: under another it is not loaded, and the Python Functions serve.
#include <ATen/TensorSubclassLikeUtils.h>
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

// What autograd calls for an op. They live as long as the process.
struct Gradient {
  std::string function;     // the public one, for messages
  OperatorHandle forward;   // what runs where a gradient is needed; its last result is kept
  OperatorHandle backward;  // (gradient of the first result, what was kept) -> gradients
  size_t inputs;            // the arguments that get one, which are the first
  std::optional<OperatorHandle> in_place;  // backward into the gradient itself
};

// Gradients of which a gradient was asked for; whoever takes that is told why it cannot be.
struct Refused : torch::autograd::Function<Refused> {
  static variable_list forward(AutogradContext* ctx, const Tensor& /*grad*/, at::TensorList found,
                               const std::string& function) {
    ctx->saved_data["function"] = function;
    variable_list same;
    for (const Tensor& each : found) {
      same.push_back(each.alias());
    }
    return same;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& /*grads*/) {
    TORCH_CHECK(false, ctx->saved_data["function"].toStringRef(),
                ": its gradient was differentiated, but has no derivative: take it without "
                "create_graph=True, or detach it");
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
Tensor laid_out(AutogradContext* ctx, Tensor grad) {
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

// Whether a dense gradient is nobody else's, so that the result may take its memory: half of the
// backward's traffic. As the engine asks where it adds gradients in place.
bool is_ours(const Tensor& grad) {
  return !at::GradMode::is_enabled() && grad.use_count() == 1 && grad.has_storage() &&
         grad.storage().use_count() == 1 && !at::isTensorSubclassLike(grad);
}

struct Masked : torch::autograd::Function<Masked> {
  static Tensor forward(AutogradContext* ctx, at::TensorList inputs, const Gradient& gradient,
                        Stack* stack) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    gradient.forward.callBoxed(*stack);
    ctx->save_for_backward({stack->back().toTensor()});
    stack->pop_back();
    const auto results = gradient.forward.schema().returns().size() - 1;
    Tensor y = torch::jit::peek(*stack, 0, results).toTensor();
    keep(ctx, gradient, y);
    if (inputs.size() > 1) {
      std::vector<int64_t> dims;  // of the learned ones, which have one element
      for (const Tensor& each : inputs.slice(1)) {
        dims.push_back(each.dim());
      }
      ctx->saved_data["dims"] = std::move(dims);
    }
    return y;
  }
  // not const: the engine's reference is taken over
  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    const Gradient& gradient = kept(ctx);
    variable_list found(gradient.inputs);
    if (grads[0].defined()) {
      Tensor grad = laid_out(ctx, std::move(grads[0]));
      const Tensor mask = ctx->get_saved_variables()[0];
      if (gradient.in_place && is_ours(grad)) {
        Stack stack{grad, mask};
        gradient.in_place->callBoxed(stack);
        found[0] = std::move(grad);
      } else {
        Stack stack{grad, mask};
        gradient.backward.callBoxed(stack);
        for (size_t i = 0; i < gradient.inputs; ++i) {
          found[i] = std::move(stack[i]).toTensor();
        }
        shape_learned(ctx, &found);
        if (at::GradMode::is_enabled()) {
          found = Refused::apply(grad, found, gradient.function);
        }
      }
    }
    found.resize(gradient.inputs + 2);  // of the arguments that are no tensors
    return found;
  }

 private:
  static void shape_learned(AutogradContext* ctx, variable_list* found) {
    if (found->size() > 1) {
      const auto dims = ctx->saved_data["dims"].toIntVector();
      for (size_t i = 1; i < found->size(); ++i) {
        (*found)[i] = (*found)[i].reshape(std::vector<int64_t>(dims[i - 1], 1));
      }
    }
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
    if (gradient_ != nullptr && at::GradMode::is_enabled() && any_requires_grad(*stack)) {
      variable_list inputs;
      for (size_t i = 0; i < gradient_->inputs; ++i) {
        inputs.push_back(torch::jit::peek(*stack, i, count_).toTensor());
      }
      Tensor y = Masked::apply(at::TensorList(inputs), *gradient_, stack);
      torch::jit::peek(*stack, 0, op.schema().returns().size()) = std::move(y);
      return;
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
  }

  bool any_requires_grad(const Stack& stack) const {
    for (size_t i = 0; i < gradient_->inputs; ++i) {
      if (torch::jit::peek(stack, i, count_).toTensor().requires_grad()) {
        return true;
      }
    }
    return false;
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
        const OperatorHandle last = find(space, backward);
        implement(
            space, op,
            new Gradient{
                op.substr(op[0] == '_'), find(space, forward), last, last.schema().returns().size(),
                c10::Dispatcher::singleton().findSchema({space + "::" + backward + "_", ""})});
      },
      py::arg("namespace"), py::arg("op"), py::arg("forward"), py::arg("backward"),
      "As implement(), with gradients of the first arguments, as many as `backward` has results:\n"
      "where one is needed `forward` runs, whose last result is kept, and `backward(gradient, "
      "kept)`\n"
      "gives them.");
}
