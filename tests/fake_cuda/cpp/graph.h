// CUDA graphs: what runs in a capture is written down and runs again at every replay.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cstring>
#include <functional>
#include <map>
#include <tuple>

#include "storage.h"

namespace fake {

using torch::jit::Stack;

struct Work {
  std::function<void()> run;
  int64_t python;  // a number that Python has given to what it runs, or -1
};

struct Graph {
  std::vector<Work> work;
  std::vector<c10::Storage> pool;  // memory of tensors made in the capture; a graph keeps it
};

struct Capture {
  Graph* graph = nullptr;  // null: no capture
  int64_t stream = 0;
  bool failed = false;
  std::map<const void*, std::pair<c10::Storage, std::vector<char>>> before;  // what a capture must leave as it was
};

inline Capture& capture() {
  static auto* instance = new Capture;
  return *instance;
}

inline std::map<int64_t, Graph>& graphs() {
  static auto* instance = new std::map<int64_t, Graph>;
  return *instance;
}

inline bool is_capturing(int64_t stream) { return capture().graph != nullptr && capture().stream == stream; }

[[noreturn]] inline void fail_capture() {
  capture().failed = true;
  raise_cuda_error(900, "operation not permitted when stream is capturing");
}

// For what waits for the device.
inline void check_waiting() {
  check_usable();
  if (capture().graph != nullptr) fail_capture();
}

inline void check_query() {
  check_usable();
  if (capture().graph != nullptr) fail_capture();
}

// For operations that wait because of their results; torch's debug mode is about these.
inline void check_synchronizing() {
  check_waiting();
  const int mode = state().sync_mode;
  TORCH_CHECK(mode != 2, "called a synchronizing CUDA operation");
  if (mode == 1) TORCH_WARN("called a synchronizing CUDA operation");
}

// Keeps the bytes of a storage that is about to be written, unless the capture allocated it.
inline void keep(const c10::Storage& storage) {
  auto& now = capture();
  const void* data = storage.data();
  if (data == nullptr || now.before.count(data)) return;
  for (const auto& made : now.graph->pool) {
    if (made.data() == data) return;
  }
  const auto* bytes = static_cast<const char*>(data);
  now.before.emplace(data, std::make_pair(storage, std::vector<char>(bytes, bytes + storage.nbytes())));
}

inline void begin_capture(int64_t id) {
  check_usable();
  auto& now = capture();
  TORCH_CHECK(now.graph == nullptr, "CUDA error: operation would make the legacy stream depend on a capturing blocking stream");
  const int64_t stream = current_streams[current_device];
  TORCH_CHECK(
      stream != 0,
      "CUDA graphs must be captured on a non-default stream. (However, after capture, it's ok to replay them on the default "
      "stream.)");
  now = Capture{};
  now.graph = &(graphs()[id] = Graph{});
  now.stream = stream;
}

// Nothing was computed in a real capture: what it allocated holds garbage, what was there before is as it was.
inline void end_capture() {
  auto& now = capture();
  TORCH_CHECK(now.graph != nullptr, "CUDA error: invalid argument");
  Graph* graph = now.graph;
  now.graph = nullptr;
  for (auto& [data, kept] : now.before) std::memcpy(const_cast<void*>(data), kept.second.data(), kept.second.size());
  now.before.clear();
  for (auto& storage : graph->pool) std::memset(const_cast<void*>(storage.data()), 0xFF, storage.nbytes());  // NaN, -1
  if (now.failed) {
    *graph = Graph{};
    raise_cuda_error(901, "operation failed due to a previous error during capture");
  }
}

inline int64_t work_count(int64_t id) {
  check_usable();
  if (capture().graph != nullptr) fail_capture();
  return static_cast<int64_t>(graphs().at(id).work.size());
}

// Runs work of the graph from `start` on, up to what Python has to run; returns where that is, and its number (or -1).
inline std::tuple<int64_t, int64_t> replay(int64_t id, int64_t start) {
  const auto& work = graphs().at(id).work;
  for (size_t i = start; i < work.size(); ++i) {
    if (work[i].python >= 0) return {static_cast<int64_t>(i), work[i].python};
    work[i].run();
  }
  return {static_cast<int64_t>(work.size()), -1};
}

}  // namespace fake
