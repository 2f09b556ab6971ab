// The operators fake_cuda::*, through which Python installs the fake and asks it what torch._C would answer.
#include <torch/library.h>

#include "kernels.h"

namespace torch::utils {  // of torch/csrc/utils/device_lazy_init.h, which needs Python's headers
void set_requires_device_init(at::DeviceType device_type, bool value);
}

namespace fake {

struct Installed {
  std::unique_ptr<torch::Library> kernels;
  const c10::impl::DeviceGuardImplInterface* guard = nullptr;
  c10::Allocator* allocator = nullptr;
  void* hooks = nullptr;
};

inline Installed& before() {
  static auto* instance = new Installed;
  return *instance;
}

inline auto& guards() { return c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::kCUDA)]; }

void install(int64_t count, int64_t total) {
  TORCH_CHECK(!state().installed, "fake_cuda: already installed");
  TORCH_CHECK(count >= 0 && count <= MAX_DEVICES, "count: got ", count, ", expected 0 to ", MAX_DEVICES);
  state().count = static_cast<int>(count);
  state().total = total;
  state().error.clear();
  state().process = 0;
  state().installation += 1;
  state().memory.fill({});
  state().sync_mode = 0;
  state().exp_off_by_one_ulp = false;
  current_device = 0;
  current_streams.fill(0);
  static auto* guard = new Guard;
  before().guard = guards().exchange(guard);
  before().allocator = c10::GetAllocator(c10::kCUDA);
  c10::SetAllocator(c10::kCUDA, &allocator(), 255);
  before().hooks = exchange_hooks(hooks_table());
  before().kernels = register_kernels();
  state().installed = true;
  Engine::start_threads();
  torch::utils::set_requires_device_init(c10::kCUDA, true);
}

void uninstall() {
  TORCH_CHECK(state().installed, "fake_cuda: not installed");
  state().installed = false;
  capture() = Capture{};
  graphs().clear();
  before().kernels.reset();
  exchange_hooks(before().hooks);
  c10::SetAllocator(c10::kCUDA, before().allocator, 255);
  guards().store(before().guard);
  torch::utils::set_requires_device_init(c10::kCUDA, true);
}

std::vector<int64_t> memory(int64_t device) {
  std::lock_guard<std::mutex> lock(state().mutex);
  const DeviceMemory& now = state().memory[check_index(static_cast<int>(device))];
  return {now.allocated, now.peak, now.allocations, now.frees, now.live};
}

void reset_peak(int64_t device) {
  std::lock_guard<std::mutex> lock(state().mutex);
  DeviceMemory& now = state().memory[check_index(static_cast<int>(device))];
  now.peak = now.allocated;
}

int64_t exchange_device(int64_t device) {
  check_usable();
  const int64_t previous = current_device;
  if (device >= 0) current_device = check_index(static_cast<int>(device));
  return previous;
}

int64_t exchange_stream(int64_t device, int64_t stream) {
  check_usable();
  auto& now = current_streams[check_index(static_cast<int>(device))];
  const int64_t previous = now;
  if (stream >= 0) now = stream;
  return previous;
}

void keep_for_capture(const at::Tensor& tensor) {
  if (capture().graph != nullptr && tensor.is_cuda()) keep(cpu_storage(tensor.storage()));
}

void record_python(int64_t number) { capture().graph->work.push_back({nullptr, number}); }

TORCH_LIBRARY(fake_cuda, m) {
  m.def("install", install);
  m.def("uninstall", uninstall);
  m.def("initialize", [] { state().process = getpid(); });
  m.def("memory", memory);
  m.def("reset_peak", reset_peak);
  m.def("default_generator", [](int64_t device) { return default_generator(static_cast<int>(device)); });
  m.def("exchange_device", exchange_device);
  m.def("exchange_stream", exchange_stream);
  m.def("check_usable", [] { check_usable(); });
  m.def("check_waiting", [] { check_waiting(); });
  m.def("set_sync_mode", [](int64_t mode) { state().sync_mode = static_cast<int>(mode); });
  m.def("sync_mode", []() -> int64_t { return state().sync_mode; });
  m.def("launches", []() -> int64_t { return state().launches; });
  m.def("count_launch", [] { state().launches += 1; });
  m.def("set_error", [](std::string message) { state().error = std::move(message); });
  m.def("set_exp_off_by_one_ulp", [](bool on) { state().exp_off_by_one_ulp = on; });
  m.def("elapsed_time", [](int64_t start, int64_t end) {
    return Guard().elapsedTime(reinterpret_cast<void*>(start), reinterpret_cast<void*>(end), 0);
  });
  m.def("is_capturing", [] { return is_capturing(current_streams[current_device]); });
  m.def("begin_capture", begin_capture);
  m.def("end_capture", end_capture);
  m.def("drop_graph", [](int64_t id) { graphs().erase(id); });
  m.def("work_count", work_count);
  m.def("replay", replay);
  m.def("keep_for_capture", keep_for_capture);
  m.def("record_python", record_python);
}

}  // namespace fake
