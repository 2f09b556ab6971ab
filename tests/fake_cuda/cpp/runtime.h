// What torch's C++ asks of a CUDA runtime: the device guard, the hooks, generators, pinned memory.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/autograd/engine.h>

#include <chrono>
#include <memory>
#include <set>

#include "graph.h"
#include "storage.h"

namespace fake {

// ---------------------------------------------------------------- generators
// A CUDA generator whose numbers a CPU generator draws.
struct Generator final : c10::GeneratorImpl {
  explicit Generator(int device, at::Generator cpu = at::detail::createCPUGenerator())
      : GeneratorImpl({c10::kCUDA, static_cast<c10::DeviceIndex>(device)}, c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        cpu(std::move(cpu)) {}

  void set_current_seed(uint64_t seed) override {
    cpu.set_current_seed(seed);
    offset = 0;
  }
  void set_offset(uint64_t value) override { offset = value; }
  uint64_t get_offset() const override { return offset; }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& value) override { cpu.unsafeGetGeneratorImpl()->set_state(value); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override { return new Generator(device().index(), cpu.clone()); }

  at::Generator cpu;
  uint64_t offset = 0;
};

inline at::Generator& default_generator(int device) {
  static auto* generators = [] {
    auto* made = new std::vector<at::Generator>;
    for (int i = 0; i < MAX_DEVICES; ++i) made->push_back(at::make_generator<Generator>(i));
    return made;
  }();
  return (*generators)[check_index(device)];
}

// ---------------------------------------------------------------- pinned memory
struct Pinned final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    check_usable();
    c10::DataPtr cpu = c10::GetCPUAllocator()->allocate(nbytes);
    void* data = cpu.get();
    {
      std::lock_guard<std::mutex> lock(mutex());
      pointers()[data] = nbytes;
    }
    return c10::DataPtr(data, new c10::DataPtr(std::move(cpu)), &release, c10::Device(c10::kCPU));
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }

  static bool holds(const void* data) {
    std::lock_guard<std::mutex> lock(mutex());
    auto after = pointers().upper_bound(data);
    if (after == pointers().begin()) return false;
    auto [start, nbytes] = *--after;
    return static_cast<const char*>(data) < static_cast<const char*>(start) + std::max<size_t>(nbytes, 1);
  }

 private:
  static void release(void* context) {
    auto* cpu = static_cast<c10::DataPtr*>(context);
    {
      std::lock_guard<std::mutex> lock(mutex());
      pointers().erase(cpu->get());
    }
    delete cpu;
  }
  static std::mutex& mutex() {
    static auto* instance = new std::mutex;
    return *instance;
  }
  static std::map<const void*, size_t>& pointers() {
    static auto* instance = new std::map<const void*, size_t>;
    return *instance;
  }
};

// ---------------------------------------------------------------- hooks
struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return state().count > 0; }
  bool hasCUDA() const override { return state().count > 0; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(state().count); }
  int getNumGPUs() const override { return state().count; }
  c10::DeviceIndex current_device() const override { return static_cast<c10::DeviceIndex>(fake::current_device); }
  c10::DeviceIndex getCurrentDevice() const override { return current_device(); }
  void setCurrentDevice(c10::DeviceIndex device) const override { fake::current_device = check_index(device); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    const c10::DeviceIndex before = current_device();
    if (device >= 0) setCurrentDevice(device);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchangeDevice(device); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override { return default_generator(device); }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return at::make_generator<Generator>(check_index(device));
  }
  bool isPinnedPtr(const void* data) const override { return Pinned::holds(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static auto* instance = new Pinned;
    return instance;
  }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator(); }
  c10::Device getDeviceFromPtr(void*) const override { return {c10::kCUDA, current_device()}; }
  void deviceSynchronize(c10::DeviceIndex) const override { check_waiting(); }
  std::string showConfig() const override { return "fake CUDA"; }
  long versionCUDART() const override { return 13000; }
  long versionCuDNN() const override { return 91900; }
  long versionRuntimeCuDNN() const override { return 91900; }
};

// ---------------------------------------------------------------- streams and events
struct Event {
  bool timing = false;
  double ms = 0;
};

inline double now_ms() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(now).count();
}

// Work is done when it is launched, so streams only have names and events only times.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device getDevice() const override { return {c10::kCUDA, static_cast<c10::DeviceIndex>(current_device)}; }
  void setDevice(c10::Device device) const override { current_device = check_index(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current_device = std::max<int>(device.index(), 0); }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  // The autograd engine starts a thread for each device once, and a later fake may have more devices.
  c10::DeviceIndex deviceCount() const noexcept override { return starting_engine ? MAX_DEVICES : state().count; }

  c10::Stream stream(c10::Device device, int64_t id) const {
    const int index = device.index() < 0 ? current_device : device.index();
    return c10::Stream(c10::Stream::UNSAFE, {c10::kCUDA, static_cast<c10::DeviceIndex>(index)}, id);
  }
  c10::Stream getStream(c10::Device device) const override {
    return stream(device, current_streams[device.index() < 0 ? current_device : device.index()]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(device, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override { return stream(device, state().next_stream++); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream given) const override {
    const c10::Stream before = getStream(given.device());
    current_streams[given.device_index()] = given.id();
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream given) const override { return reinterpret_cast<void*>(given.id()); }
  bool queryStream(const c10::Stream&) const override {
    check_query();
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override { check_waiting(); }
  void synchronizeDevice(const c10::DeviceIndex) const override { check_waiting(); }
  bool isStreamCapturing(const c10::Stream& given) const { return is_capturing(given.id()); }  // virtual from torch 2.12 on

  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag flag) const override {
    check_usable();
    if (*event == nullptr) *event = new Event;
    auto* recorded = static_cast<Event*>(*event);
    recorded->timing = flag == c10::EventFlag::BACKEND_DEFAULT;
    recorded->ms = now_ms();
  }
  void block(void*, const c10::Stream&) const override { check_usable(); }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  bool queryEvent(void*) const override {
    check_query();
    return true;
  }
  void synchronizeEvent(void*) const override { check_waiting(); }
  double elapsedTime(void* start, void* end, const c10::DeviceIndex) const override {
    TORCH_CHECK(start && end, "Both events must be recorded before calculating elapsed time.");
    const auto *first = static_cast<Event*>(start), *second = static_cast<Event*>(end);
    TORCH_CHECK_VALUE(first->timing && second->timing, "Both events must be created with argument 'enable_timing=True'.");
    check_query();
    return std::max(second->ms - first->ms, 1e-3);
  }

  static inline thread_local bool starting_engine = false;
};

// ---------------------------------------------------------------- the autograd engine
struct Engine : torch::autograd::Engine {
  // Starts the threads that run backward passes of devices; an engine that ran before had no devices to start them for.
  static void start_threads() {
    auto& engine = torch::autograd::Engine::get_default_engine();
    Guard::starting_engine = true;
    engine.initialize_device_threads_pool();
    constexpr auto queues = &Engine::device_ready_queues_;
    constexpr auto start = &Engine::start_device_threads;
    if ((engine.*queues).empty()) (engine.*start)();
    Guard::starting_engine = false;
  }
};

// ---------------------------------------------------------------- putting it in place
// torch holds the hooks in a static object that nothing can replace: its table of virtual functions is.
inline void* exchange_hooks(void* table) {
  auto* held = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  void* before = *reinterpret_cast<void**>(held);
  *reinterpret_cast<void**>(held) = table;
  return before;
}

inline void* hooks_table() {
  static auto* hooks = new Hooks;
  return *reinterpret_cast<void**>(hooks);
}

}  // namespace fake
