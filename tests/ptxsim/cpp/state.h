// State of a launch, a CTA and a warp while a program runs, and errors that say where they happened.
#pragma once
#include <atomic>
#include <mutex>

#include "program.h"

static const int NO_SPLIT = 0x7fffffff;

// Lanes of a warp that went another way than the active ones.
struct Split {
  int pc;
  u32 mask;
  bool wait;  // at a .sync or barrier whose other lanes have not arrived
};
struct CopyOp {
  u32 dst;
  u8 n;
  u8 data[16];
};
enum WarpState { W_RUNS, W_AT_BARRIER, W_DONE };
struct Warp {
  u8* base = nullptr;    // register file
  u32* preds = nullptr;  // predicates, one bit per lane
  u8* local = nullptr;
  int id = 0, pc = 0;
  u32 active = 0, exited = 0, valid = FULL;
  u32 carry = 0;  // condition code of add.cc and the like, one bit per lane
  std::vector<Split> splits;
  int min_split = NO_SPLIT;  // smallest pc of a split that can run: where the active lanes have to stop for it
  WarpState state = W_RUNS;
  int bar = -1;
  u64 bar_count = 0;
  bool bar_arrive = false;
  u32 bar_pred = 0;
  std::vector<std::vector<CopyOp>> copy_groups;  // cp.async groups that are committed but not waited for
  std::vector<CopyOp> copy_open;
  std::vector<std::vector<u32>> wgmma_groups;  // 16-byte blocks of shared memory that each group reads
  std::vector<u32> wgmma_open;
  u64 icount = 0;
};

// Race and initialisation checks, per byte of shared memory. Each warp has a vector clock; barriers join the clocks.
struct Shadow {
  int warps = 0;
  std::vector<u8> init, pending;           // pending: cp.async writes in flight
  std::vector<u32> write_clock, read_clock;  // read_clock: warps x bytes
  std::vector<u8> write_warp;
  std::vector<s32> write_line, read_line;
  std::vector<u32> clock;                      // warps x warps
  std::map<u32, std::vector<u32>> mbar_clock;  // what an mbarrier's waiters learn

  u32* last_reads(int warp) { return read_clock.data() + (size_t)warp * write_line.size(); }
};

enum Order { ORDER_FORWARD, ORDER_REVERSE, ORDER_RANDOM };
struct Config {  // the layout of _Config in library.py
  u32 grid[3], block[3];
  u32 shared, threads;
  u64 max_instr;
  u32 check_init, check_race, check_global, stats;
  u32 cta_order, warp_order, seed, cp_early;
  u64 cta_begin, cta_end;
  u64 slice;
};

struct CTA {
  u32 id[3];
  u64 linear;
  std::vector<u8> shared, arena, local;
  std::vector<Warp> warps;
  std::vector<u32> preds;
  Shadow shadow;
};

struct Launch {
  const Program* prog;
  Config config;
  std::vector<u8> params;
  std::vector<Alloc> allocs;  // sorted by lo
  std::vector<std::string> names;
  std::atomic<u64> next{0};
  std::atomic<bool> stop{false};
  std::mutex error_mutex;
  std::string error;
  bool multithreaded = false;
  std::mutex atomic_mutex;
};

// What a handler sees: the warp that runs, its mask, and the counters of the instruction.
struct Ctx {
  u8* base;
  u32 mask;
  u32* preds;
  Warp* warp;
  CTA* cta;
  const Program* prog;
  Launch* launch;
  const Alloc* last;  // where the previous global access landed: mostly the next one lands there too
  Stat* stats;
  Stat* stat;
  u32 stamp;  // set of sectors of one access, emptied by counting up the stamp
  u32 sector_stamp[256];
  u64 sector_key[256];
  bool yield;  // set by a handler that waits for another warp
  u64 clock;

  bool shadowed() const { return launch->config.check_race | launch->config.check_init; }
};

template <class T> INLINE T* lanes(Ctx& ctx, u32 slot) { return (T*)(ctx.base + slot); }
INLINE bool on(u32 mask, int lane) { return (mask >> lane) & 1u; }
#define EACH_LANE(i) for (int i = 0; i < 32; i++)
// The empty branch keeps an `else` after the loop's body from binding to this `if`.
#define EACH_ACTIVE(i, mask) \
  for (int i = 0; i < 32; i++) \
    if (!on(mask, i)) { \
    } else
// Lanes never depend on each other, even where destination and source are the same register.
#define IVDEP _Pragma("GCC ivdep")

INLINE void put_predicate(Ctx& ctx, s32 pred, u32 bits) {
  ctx.preds[pred] = (ctx.preds[pred] & ~ctx.mask) | (bits & ctx.mask);
}

static std::string ptx_text(const Program& P, int line) {
  return line > 0 && line <= (int)P.lines.size() ? P.lines[line - 1] : "?";
}

static std::string where(Ctx& ctx, const Ins& ins, int lane) {
  const Program& P = *ctx.prog;
  std::string s = fmt("kernel '%s', PTX line %d: `%s`", P.name.c_str(), ins.line, ptx_text(P, ins.line).c_str());
  if (ins.loc >= 0) {
    auto file = [&](int id) {
      auto it = P.files.find(id);
      return it == P.files.end() ? "?" : it->second.c_str();
    };
    const Loc& l = P.locs[ins.loc];
    s += fmt("\n  source: %s:%d", file(l.user_file), l.user_line);
    if (l.file != l.user_file || l.line != l.user_line) s += fmt(" (inlined from %s:%d)", file(l.file), l.line);
  }
  const u32* id = ctx.cta->id;
  if (lane < 0) return s + fmt("\n  warp %d of CTA (%u,%u,%u)", ctx.warp->id, id[0], id[1], id[2]);
  u32 t = ctx.warp->id * 32 + lane;
  const u32* b = ctx.launch->config.block;
  return s + fmt("\n  thread (%u,%u,%u) [warp %d lane %d] of CTA (%u,%u,%u)", t % b[0], t / b[0] % b[1], t / b[0] / b[1],
                 ctx.warp->id, lane, id[0], id[1], id[2]);
}

// `lane` -1: the whole warp.
[[noreturn]] static void fail(Ctx& ctx, const Ins& ins, int lane, const std::string& what) {
  throw SimError("ptxsim: " + what + "\n  " + where(ctx, ins, lane));
}
