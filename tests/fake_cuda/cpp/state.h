// State of the fake: devices, memory, errors, the current device and stream of each thread.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>

#include <unistd.h>

namespace fake {

constexpr int MAX_DEVICES = 8;
constexpr int64_t BLOCK = 512;  // PyTorch's caching allocator rounds sizes up to this

struct DeviceMemory {
  int64_t allocated = 0, peak = 0, allocations = 0, frees = 0, live = 0;
};

struct State {
  std::atomic<bool> installed{false};
  int count = 0;
  std::atomic<int> process{0};      // that initialized CUDA: one forked from it cannot use it
  std::atomic<int> installation{0};
  int64_t total = 0;  // bytes of each device
  std::mutex mutex;   // of memory
  std::array<DeviceMemory, MAX_DEVICES> memory;
  std::string error;  // once set, every call raises it, as after an illegal access
  std::atomic<int> sync_mode{0};
  std::atomic<int64_t> launches{0};
  std::atomic<bool> exp_off_by_one_ulp{false};
  std::atomic<int64_t> next_stream{1};
};

inline State& state() {
  static State* instance = new State;  // tensors may outlive main
  return *instance;
}

inline thread_local int current_device = 0;
inline thread_local std::array<int64_t, MAX_DEVICES> current_streams{};

// ---------------------------------------------------------------- errors
constexpr const char* ADVICE =
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n";

[[noreturn]] inline void raise_cuda_error(int code, const std::string& message) {
  throw c10::AcceleratorError({__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, code, "CUDA error: " + message + ADVICE);
}

inline void check_usable() {
  TORCH_CHECK(state().installed, "Torch not compiled with CUDA enabled");
  TORCH_CHECK(
      state().process == 0 || state().process == getpid(),
      "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use the 'spawn' start method");
  if (!state().error.empty()) raise_cuda_error(700, state().error);
}

inline c10::DeviceIndex check_index(int index) {
  if (index < 0) index = current_device;
  if (index >= state().count) {
    raise_cuda_error(101, "invalid device ordinal\nGPU device may be out of range, do you have enough GPUs?");
  }
  return static_cast<c10::DeviceIndex>(index);
}

// ---------------------------------------------------------------- memory
inline int64_t block_bytes(int64_t nbytes) { return (nbytes + BLOCK - 1) / BLOCK * BLOCK; }

inline std::string readable(int64_t bytes) {
  char text[32];
  const double mebi = bytes / 1048576.0;
  if (mebi >= 1024) std::snprintf(text, sizeof(text), "%.2f GiB", mebi / 1024);
  else std::snprintf(text, sizeof(text), "%.2f MiB", mebi);
  return text;
}

inline void check_fits(int device, int64_t nbytes) {
  std::lock_guard<std::mutex> lock(state().mutex);
  const DeviceMemory& memory = state().memory[device];
  const int64_t free = state().total - memory.allocated;
  TORCH_CHECK_WITH(
      OutOfMemoryError, block_bytes(nbytes) <= free, "CUDA out of memory. Tried to allocate ", readable(nbytes), ". GPU ",
      device, " has a total capacity of ", readable(state().total), " of which ", readable(free),
      " is free. Of the allocated memory ", readable(memory.allocated),
      " is allocated by PyTorch, and 0 bytes is reserved by PyTorch but unallocated. If reserved but unallocated memory is "
      "large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.");
}

inline void count_allocation(int device, int64_t nbytes) {
  std::lock_guard<std::mutex> lock(state().mutex);
  DeviceMemory& memory = state().memory[device];
  memory.allocated += block_bytes(nbytes);
  memory.peak = std::max(memory.peak, memory.allocated);
  memory.allocations += 1;
  memory.live += 1;
}

inline void count_free(int device, int64_t nbytes) {
  std::lock_guard<std::mutex> lock(state().mutex);
  DeviceMemory& memory = state().memory[device];
  memory.allocated -= block_bytes(nbytes);
  memory.frees += 1;
  memory.live -= 1;
}

}  // namespace fake
