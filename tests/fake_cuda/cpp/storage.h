// CUDA storages over CPU memory: both directions share the memory and copy nothing.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>

#include <vector>

#include "state.h"

namespace fake {

// What a CUDA storage owns: the CPU storage that holds its bytes.
struct Owned {
  c10::Storage cpu;
  int device;
  int64_t nbytes;
  int installation;
};

inline void free_owned(void* context) {
  auto* owned = static_cast<Owned*>(context);
  if (owned->installation == state().installation) count_free(owned->device, owned->nbytes);
  delete owned;
}

inline c10::DataPtr own(c10::Storage cpu, int device) {
  const int64_t nbytes = static_cast<int64_t>(cpu.nbytes());
  void* data = const_cast<void*>(cpu.data());
  const c10::Device where(c10::kCUDA, static_cast<c10::DeviceIndex>(device));
  if (nbytes == 0) return c10::DataPtr(nullptr, where);
  count_allocation(device, nbytes);
  return c10::DataPtr(data, new Owned{std::move(cpu), device, nbytes, state().installation}, &free_owned, where);
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    check_usable();
    const int device = check_index(-1);
    check_fits(device, static_cast<int64_t>(nbytes));
    c10::Storage cpu(c10::Storage::use_byte_size_t(), nbytes, c10::GetCPUAllocator(), true);
    return own(std::move(cpu), device);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }
};

inline Allocator& allocator() {
  static auto* instance = new Allocator;
  return *instance;
}

inline c10::Storage cuda_storage(c10::Storage cpu, int device) {
  const size_t nbytes = cpu.nbytes();
  check_fits(device, static_cast<int64_t>(nbytes));
  return c10::Storage(c10::Storage::use_byte_size_t(), nbytes, own(std::move(cpu), device), &allocator(), true);
}

// The CPU storage that holds the bytes of a CUDA one.
inline c10::Storage cpu_storage(const c10::Storage& cuda) {
  const auto* owned = cuda.data_ptr().cast_context<Owned>(&free_owned);
  if (owned != nullptr) return owned->cpu;
  return c10::Storage(c10::Storage::use_byte_size_t(), 0, c10::GetCPUAllocator(), true);  // of no bytes
}

inline at::Tensor shaped(at::Tensor made, const at::Tensor& tensor) {
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  if (tensor.is_conj()) impl->_set_conj(true);
  if (tensor.is_neg()) impl->_set_neg(true);
  return made;
}

inline at::Tensor like(const at::Tensor& tensor, c10::Storage storage, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), tensor.dtype());
  return shaped(std::move(made), tensor);
}

// The tensors of one call on both sides: CUDA tensors, and their CPU aliases that the CPU kernel is given.
class Aliases {
 public:
  at::Tensor alias(const at::Tensor& cuda) {
    for (auto& pair : tensors_) {
      if (pair.cuda.is_same(cuda)) return pair.cpu;
    }
    at::Tensor cpu = like(cuda, alias(cuda.storage()), c10::DispatchKey::CPU);
    tensors_.push_back({cuda, cpu});
    return cpu;
  }

  c10::Storage alias(const c10::Storage& cuda) {
    for (auto& pair : storages_) {
      if (pair.cuda.is_alias_of(cuda)) return pair.cpu;
    }
    c10::Storage cpu = cpu_storage(cuda);
    storages_.push_back({cuda, cpu, cpu.data(), cpu.nbytes()});
    return cpu;
  }

  // Carries what the CPU kernel did to its arguments over: new sizes, another storage, a storage that has grown.
  void carry_over(int device) {
    for (auto& pair : storages_) {
      if (pair.cpu.data() != pair.data || pair.cpu.nbytes() != pair.nbytes) {
        check_fits(device, static_cast<int64_t>(pair.cpu.nbytes()));
        pair.cuda.set_data_ptr_noswap(own(pair.cpu, device));
        pair.cuda.set_nbytes(pair.cpu.nbytes());
      }
    }
    for (auto& pair : tensors_) {
      auto* impl = pair.cuda.unsafeGetTensorImpl();
      if (!pair.cuda.sizes().equals(pair.cpu.sizes()) || !pair.cuda.strides().equals(pair.cpu.strides()) ||
          pair.cuda.storage_offset() != pair.cpu.storage_offset()) {
        impl->set_sizes_and_strides(pair.cpu.sizes(), pair.cpu.strides(), pair.cpu.storage_offset());
      }
      const c10::Storage* owner = find(pair.cpu.storage());
      if (owner == nullptr) impl->set_storage_keep_dtype(cuda_storage(pair.cpu.storage(), device));
      else if (!owner->is_alias_of(pair.cuda.storage())) impl->set_storage_keep_dtype(*owner);
    }
  }

  // The CUDA tensor for a tensor that a CPU kernel returned.
  at::Tensor returned(const at::Tensor& cpu, int device) {
    for (auto& pair : tensors_) {
      if (pair.cpu.is_same(cpu)) return pair.cuda;
    }
    const c10::Storage* owner = find(cpu.storage());
    if (owner == nullptr) {
      c10::Storage made = cuda_storage(cpu.storage(), device);
      storages_.push_back({made, cpu.storage(), cpu.storage().data(), cpu.storage().nbytes()});
      owner = &storages_.back().cuda;
    }
    for (auto& pair : tensors_) {
      if (pair.cuda.storage().is_alias_of(*owner)) return view(cpu, pair.cuda);
    }
    return like(cpu, *owner, c10::DispatchKey::CUDA);
  }

  // Whether memory came with the arguments.
  bool is_given(const at::Tensor& cpu) const { return find(cpu.storage()) != nullptr; }

 private:
  struct Tensors {
    at::Tensor cuda, cpu;
  };
  struct Storages {
    c10::Storage cuda, cpu;
    const void* data;
    size_t nbytes;
  };

  // In inference mode too a view of a tensor with autograd keys has these.
  static at::Tensor view(const at::Tensor& cpu, const at::Tensor& base) {
    auto made = at::detail::make_tensor<c10::TensorImpl>(
        c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), cpu.dtype());
    return shaped(std::move(made), cpu);
  }

  const c10::Storage* find(const c10::Storage& cpu) const {
    for (const auto& pair : storages_) {
      if (pair.cpu.is_alias_of(cpu)) return &pair.cuda;
    }
    return nullptr;
  }

  std::vector<Tensors> tensors_;
  std::vector<Storages> storages_;
};

}  // namespace fake
