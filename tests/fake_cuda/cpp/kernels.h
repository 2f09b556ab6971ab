// The kernel of every aten operator on CUDA tensors: checks what CUDA checks, then runs the CPU kernel on the same memory.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <set>
#include <string>

#include "runtime.h"

namespace fake {

inline bool is_one_of(const std::set<std::string>& names, const c10::OperatorHandle& op) {
  return names.count(op.operator_name().name) > 0;
}

// Results depend on values, so the host has to wait for them.
inline const std::set<std::string> WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero",    "aten::equal",      "aten::masked_select",      "aten::_unique2",
    "aten::_unique",             "aten::unique_dim", "aten::bincount",   "aten::unique_consecutive", "aten::repeat_interleave",
};
inline const std::set<std::string> COPIES = {"aten::copy_"};
inline const std::set<std::string> INDEXES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
inline const std::set<std::string> MIXES = {
    "aten::copy_", "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::set_"};
inline const std::set<std::string> EMPTY = {"aten::empty", "aten::empty_strided"};
inline const std::set<std::string> EXP = {"aten::exp", "aten::exp_"};
// Composite operators that would look for CUDA kernels of their own.
inline const std::set<std::string> COMPOSITE = {"aten::copy_", "aten::convolution", "aten::convolution_backward"};

// One call of an operator.
class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack* stack) : op_(op), schema_(op.schema()) {
    const size_t count = schema_.arguments().size();
    arguments_.assign(std::make_move_iterator(stack->end() - count), std::make_move_iterator(stack->end()));
    stack->resize(stack->size() - count);
  }

  void run(Stack* stack) {
    check_usable();
    look();
    check_devices();
    check_waits();
    check_size();
    for (size_t i = 0; i < arguments_.size(); ++i) to_cpu(schema_.arguments()[i], arguments_[i]);
    if (is_recording()) keep_written();
    const Stack given = is_recording() ? arguments_ : Stack();
    execute(op_, arguments_);
    state().launches += !is_view() && !is_one_of(EMPTY, op_);
    if (is_recording()) record(given, arguments_);
    aliases_.carry_over(device_);
    for (c10::IValue& result : arguments_) stack->push_back(to_cuda(result));
  }

 private:
  // ---------------------------------------------------------------- checks
  void look() {
    for (size_t i = 0; i < arguments_.size(); ++i) {
      const c10::IValue& value = arguments_[i];
      const std::string& name = schema_.arguments()[i].name();
      if (value.isTensor()) look(value.toTensor(), name);
      else if (value.isTensorList()) for (const at::Tensor& tensor : value.toTensorVector()) look(tensor, name);
      else if (value.isOptionalTensorList()) {
        for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) if (tensor) look(*tensor, name);
      } else if (value.isDevice() && value.toDevice().is_cuda() && device_ < 0) device_ = check_index(value.toDevice().index());
      else if (value.isStorage() && value.toStorage().device().is_cuda()) device_ = value.toStorage().device().index();
    }
    if (device_ < 0) device_ = check_index(-1);
  }

  void look(const at::Tensor& tensor, const std::string& name) {
    if (!tensor.defined()) return;
    if (tensor.is_cuda()) {
      if (!has_cuda_) device_ = tensor.device().index();
      else if (tensor.device().index() != device_ && odd_.empty()) odd_ = name, odd_device_ = tensor.device();
      has_cuda_ = true;
    } else if (tensor.is_cpu()) {
      cpu_arguments_.push_back(tensor);
      if (tensor.dim() > 0 && odd_.empty()) odd_ = name, odd_device_ = tensor.device();
    }
  }

  void check_devices() const {
    if (!has_cuda_ || odd_.empty() || is_one_of(MIXES, op_)) return;
    const std::string method = op_.operator_name().name.substr(6);
    TORCH_CHECK(
        false, "Expected all tensors to be on the same device, but got ", odd_, " is on ", odd_device_,
        ", different from other tensors on cuda:", device_, " (when checking argument in method wrapper_CUDA_", method, ")");
  }

  void check_waits() const {
    if (is_one_of(WAITS, op_) && !(op_.operator_name().name == "aten::repeat_interleave" && arguments_.back().isInt())) {
      check_synchronizing();
    }
    if (is_one_of(COPIES, op_) && !cpu_arguments_.empty() && !arguments_[2].toBool() && arguments_[0].toTensor().numel() > 0) {
      check_synchronizing();  // between host and device
    }
    if (is_one_of(INDEXES, op_)) {
      for (const std::optional<at::Tensor>& index : arguments_[1].toOptionalTensorVector()) {
        const bool counts = index && index->defined() && (index->scalar_type() == at::kBool || index->scalar_type() == at::kByte);
        if (counts || (index && index->defined() && index->is_cpu())) check_synchronizing();
      }
    }
  }

  void check_size() const {
    if (!is_one_of(EMPTY, op_)) return;
    int64_t elements = 1;
    for (const int64_t size : arguments_[0].toIntVector()) elements *= size;
    const size_t dtype = op_.operator_name().name == "aten::empty" ? 1 : 2;
    const auto type = arguments_[dtype].isNone() ? at::get_default_dtype_as_scalartype() : arguments_[dtype].toScalarType();
    check_fits(device_, elements * static_cast<int64_t>(c10::elementSize(type)));
  }

  bool is_view() const {
    const auto& returns = schema_.returns();
    return !returns.empty() && returns[0].alias_info() && !returns[0].alias_info()->isWrite();
  }

  // ---------------------------------------------------------------- to the CPU and back
  void to_cpu(const c10::Argument& argument, c10::IValue& value) {
    if (value.isTensor()) {
      value = to_cpu(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> tensors;
      for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(to_cpu(tensor));
      value = tensors;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> tensors;
      for (const auto& tensor : value.toOptionalTensorVector()) {
        tensors.push_back(tensor ? std::optional<at::Tensor>(to_cpu(*tensor)) : std::nullopt);
      }
      value = tensors;
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      value = c10::Device(c10::kCPU);
    } else if (value.isStorage() && value.toStorage().device().is_cuda()) {
      value = aliases_.alias(value.toStorage());
    } else if (argument.type()->str() == "Generator?" || argument.type()->str() == "Generator") {
      const at::Generator given = value.isNone() ? default_generator(device_) : value.toGenerator();
      TORCH_CHECK(
          given.device().is_cuda(), "Expected a 'cuda' device type for generator but found '", given.device().type(), "'");
      value = static_cast<Generator*>(given.unsafeGetGeneratorImpl())->cpu;
    }
  }

  at::Tensor to_cpu(const at::Tensor& tensor) {
    return tensor.defined() && tensor.is_cuda() ? aliases_.alias(tensor) : tensor;
  }

  c10::IValue to_cuda(const c10::IValue& value) {
    if (value.isTensor()) return to_cuda(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<at::Tensor> tensors;
    for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(to_cuda(tensor));
    return tensors;
  }

  at::Tensor to_cuda(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cpu() || !tensor.has_storage()) return tensor;
    for (const at::Tensor& given : cpu_arguments_) if (given.is_same(tensor)) return tensor;
    return aliases_.returned(tensor, device_);
  }

  // ---------------------------------------------------------------- running
  static void execute(const c10::OperatorHandle& op, Stack& stack) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
    if (!state().exp_off_by_one_ulp || !is_one_of(EXP, op)) return;
    const at::Tensor result = stack[0].toTensor();
    if (result.scalar_type() == at::kFloat) {
      at::nextafter_out(const_cast<at::Tensor&>(result), result, at::full_like(result, INFINITY));
    }
  }

  // ---------------------------------------------------------------- captures
  bool is_recording() const { return is_capturing(current_streams[device_]); }

  template <typename F>
  static void each_tensor(const c10::IValue& value, F&& visit) {
    if (value.isTensor() && value.toTensor().defined()) visit(value.toTensor());
    if (value.isTensorList()) for (const at::Tensor& tensor : value.toTensorVector()) visit(tensor);
  }

  void keep_written() {
    for (size_t i = 0; i < arguments_.size(); ++i) {
      const auto* alias = schema_.arguments()[i].alias_info();
      if (alias == nullptr || !alias->isWrite()) continue;
      each_tensor(arguments_[i], [](const at::Tensor& tensor) { keep(tensor.storage()); });
    }
  }

  void record(const Stack& given, const Stack& results) {
    std::vector<at::Tensor> made;
    for (const c10::IValue& result : results) {
      each_tensor(result, [&](const at::Tensor& tensor) {
        if (!tensor.is_cpu() || !tensor.has_storage() || aliases_.is_given(tensor)) return;
        capture().graph->pool.push_back(tensor.storage());
        made.push_back(tensor);
      });
    }
    if (is_view() || is_one_of(EMPTY, op_)) return;
    const bool returns_new = !made.empty();
    capture().graph->work.push_back({[op = op_, given, results, returns_new] {
                                       Stack again = given;
                                       state().launches += 1;
                                       execute(op, again);
                                       if (!returns_new) return;
                                       for (size_t i = 0; i < results.size(); ++i) copy_back(again[i], results[i]);
                                     },
                                     -1});
  }

  static void copy_back(const c10::IValue& again, const c10::IValue& before) {
    if (before.isTensor() && before.toTensor().defined()) before.toTensor().copy_(again.toTensor());
    if (!before.isTensorList()) return;
    const auto sources = again.toTensorVector(), targets = before.toTensorVector();
    for (size_t i = 0; i < targets.size(); ++i) const_cast<at::Tensor&>(targets[i]).copy_(sources[i]);
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  Stack arguments_;
  Aliases aliases_;
  std::vector<at::Tensor> cpu_arguments_;
  int device_ = -1;
  bool has_cuda_ = false;
  std::string odd_;  // an argument on another device than the first CUDA tensor
  c10::Device odd_device_{c10::kCPU};
};

inline void kernel(const c10::OperatorHandle& op, Stack* stack) { Call(op, stack).run(stack); }

// Fused attention kernels have no counterpart on the CPU: products and a softmax, which is number 0.
inline void attention_backend(const c10::OperatorHandle& op, Stack* stack) {
  stack->resize(stack->size() - op.schema().arguments().size());
  stack->push_back(static_cast<int64_t>(0));
}

inline void record_stream(at::Tensor&, c10::Stream) { check_usable(); }

// ---------------------------------------------------------------- registration
struct Silent final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

// Registers the kernel for every aten operator that has one for CPU tensors, in front of a CUDA build's own.
inline std::unique_ptr<torch::Library> register_kernels() {
  Silent silent;
  c10::WarningUtils::WarningHandlerGuard no_warning_of_overridden_kernels(&silent);
  auto library =
      std::make_unique<torch::Library>(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    if (name.name.rfind("aten::", 0) != 0) continue;
    const auto op = dispatcher.findSchema(name);
    if (!op) continue;
    const bool has_kernel =
        op->hasKernelForDispatchKey(c10::DispatchKey::CPU) || op->hasKernelForDispatchKey(c10::DispatchKey::CUDA);
    if (name.name == "aten::_fused_sdp_choice" || name.name == "aten::record_stream") continue;
    if (!has_kernel && !is_one_of(COMPOSITE, *op)) continue;
    const std::string full = name.name + (name.overload_name.empty() ? "" : "." + name.overload_name);
    library->impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&kernel>());
  }
  library->impl("record_stream", record_stream);
  library->impl("_fused_sdp_choice", torch::CppFunction::makeFromBoxedFunction<&attention_backend>());
  return library;
}

}  // namespace fake
