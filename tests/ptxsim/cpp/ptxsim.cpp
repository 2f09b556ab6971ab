// The C interface that library.py calls. The whole simulator is this one translation unit: the handlers' helpers inline into
// them, and each header compiles once.
#include <thread>

#include "decode.h"
#include "engine.h"

static void put_text(char* to, int size, const std::string& s) {
  if (to && size > 0) snprintf(to, (size_t)size, "%s", s.c_str());
}

// Shadow memory of the launch's allocations, where it is on.
struct AllocShadows {
  std::vector<std::vector<u8>> sector_read, sector_written;
  std::vector<std::vector<u32>> cta_wrote, cta_read;
  std::vector<std::vector<s32>> line_wrote;

  void add(Alloc& a, const Config& config) {
    size_t bytes = a.hi - a.lo, sectors = bytes ? (size_t)(((a.hi - 1) >> 5) - (a.lo >> 5) + 1) : 0;
    sector_read.emplace_back(config.stats ? sectors : 0, 0);
    sector_written.emplace_back(config.stats ? sectors : 0, 0);
    if (config.stats) {
      a.sector_read = sector_read.back().data();
      a.sector_written = sector_written.back().data();
    }
    if (!config.check_global || !bytes) return;
    a.cta_wrote = cta_wrote.emplace_back(bytes, 0).data();
    a.cta_read = cta_read.emplace_back(bytes, 0).data();
    a.line_wrote = line_wrote.emplace_back(bytes, 0).data();
  }
};

static void run_grid(Launch& L, std::vector<std::vector<Stat>>& stats) {
  std::vector<std::thread> others;
  for (size_t k = 1; k < stats.size(); k++) others.emplace_back(worker, &L, stats[k].data());
  worker(&L, stats[0].data());
  for (auto& t : others) t.join();
}

extern "C" {

void* ptxsim_load(const char* ptx, const char* entry, char* err, int n) {
  try {
    return build_program(ptx, entry).release();
  } catch (std::exception& e) {
    put_text(err, n, e.what());
    return nullptr;
  }
}
void ptxsim_free(void* program) { delete (Program*)program; }

// out: instructions, parameters, bytes of parameters, .reqntid x, y, z, unsupported instructions
void ptxsim_info(void* program, s64* out) {
  Program* P = (Program*)program;
  out[0] = (s64)P->code.size();
  out[1] = (s64)P->params.size();
  out[2] = P->param_bytes;
  for (int k = 0; k < 3; k++) out[3 + k] = P->reqntid[k];
  out[6] = 0;
  for (auto& ins : P->code) out[6] += ins.fn == h_unsupported;
}
void ptxsim_params(void* program, int* off, int* size) {
  for (auto& p : ((Program*)program)->params) {
    *off++ = p.off;
    *size++ = p.size;
  }
}
// Per instruction: class, PTX line, flops, file id and line of the user's source
void ptxsim_code(void* program, int* cls, int* line, int* flops, int* file, int* source_line) {
  Program* P = (Program*)program;
  for (auto& ins : P->code) {
    *cls++ = ins.cls;
    *line++ = ins.line;
    *flops++ = (int)ins.flops;
    *file++ = ins.loc >= 0 ? P->locs[ins.loc].user_file : 0;
    *source_line++ = ins.loc >= 0 ? P->locs[ins.loc].user_line : 0;
  }
}
// The k-th unsupported instruction; 0 if there are fewer.
int ptxsim_unsupported(void* program, int k, char* buf, int n) {
  Program* P = (Program*)program;
  for (auto& ins : P->code)
    if (ins.fn == h_unsupported && k-- == 0) {
      put_text(buf, n, fmt("PTX line %d: %s", ins.line, ins.text >= 0 ? P->messages[ins.text].c_str() : "?"));
      return 1;
    }
  return 0;
}
int ptxsim_file(void* program, int id, char* buf, int n) {
  Program* P = (Program*)program;
  auto it = P->files.find(id);
  if (it == P->files.end()) return 0;
  put_text(buf, n, it->second);
  return 1;
}
int ptxsim_config_size() { return (int)sizeof(Config); }

// stats: the eight counters of Stat per instruction; unique_sectors: per allocation those read, written, and either.
// Returns 1 and a message in `err` when the kernel did something it should not.
int ptxsim_launch(void* program, const Config* config, const u8* params, int param_bytes, const u64* lo, const u64* nbytes,
                  const char* const* names, int allocs, u64* stats, u64* unique_sectors, char* err, int n) {
  Program* P = (Program*)program;
  Launch L;
  L.prog = P;
  L.config = *config;
  L.params.assign(params, params + param_bytes);
  Config& c = L.config;
  u64 ctas = (u64)c.grid[0] * c.grid[1] * c.grid[2];
  if (!c.slice) c.slice = 1 << 20;
  if (!c.max_instr) c.max_instr = ~0ull >> 1;
  if (!c.cta_end || c.cta_end > ctas) c.cta_end = ctas;
  c.shared += P->static_shared;

  AllocShadows shadows;
  for (int i = 0; i < allocs; i++) {
    Alloc a{lo[i], lo[i] + nbytes[i], i, nullptr, nullptr};
    shadows.add(a, c);
    L.names.push_back(names && names[i] ? names[i] : "?");
    L.allocs.push_back(a);
  }
  std::sort(L.allocs.begin(), L.allocs.end(), [](const Alloc& a, const Alloc& b) { return a.lo < b.lo; });

  u64 threads = c.check_global ? 1 : std::max(1u, c.threads);  // the shadow of check_global is not locked
  threads = std::min(threads, std::max<u64>(1, ctas));
  L.multithreaded = threads > 1;
  size_t code = P->code.size();
  std::vector<std::vector<Stat>> per_thread(threads, std::vector<Stat>(code, Stat{}));
  run_grid(L, per_thread);

  for (auto& thread : per_thread)
    for (size_t i = 0; i < code; i++) {
      const Stat& s = thread[i];
      const u64 row[8] = {s.exec, s.lanes, s.bytes, s.sectors, s.ideal, s.wavefronts, s.ideal_wavefronts, s.divergent};
      for (int k = 0; k < 8; k++) stats[i * 8 + k] += row[k];
    }
  for (int i = 0; i < allocs; i++) {
    auto &read = shadows.sector_read[i], &written = shadows.sector_written[i];
    for (size_t k = 0; k < read.size(); k++) {
      unique_sectors[3 * i] += read[k];
      unique_sectors[3 * i + 1] += written[k];
      unique_sectors[3 * i + 2] += read[k] | written[k];
    }
  }
  if (L.error.empty()) return 0;
  put_text(err, n, L.error);
  return 1;
}
}
