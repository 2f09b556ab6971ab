// Checks that a GPU does not make: bounds of tensors, races in shared and global memory, reads of uninitialised shared memory.
#pragma once
#include <algorithm>

#include "state.h"

typedef unsigned long long ull;
enum { RW_R = 1, RW_W = 2 };

// ---------------------------------------------------------------- bounds
// The allocation that holds all n bytes, or null. Views may overlap, so an allocation that starts earlier can still do.
static const Alloc* find_alloc(Ctx& ctx, u64 a, u64 n) {
  auto& v = ctx.launch->allocs;
  auto it = std::upper_bound(v.begin(), v.end(), a, [](u64 x, const Alloc& y) { return x < y.lo; });
  while (it != v.begin()) {
    --it;
    if (a >= it->lo && a + n <= it->hi) return &*it;
    if (it->hi <= a) break;
  }
  for (auto& g : ctx.prog->global_allocs)
    if (a >= g.lo && a + n <= g.hi) return &g;
  return nullptr;
}

[[noreturn]] static void fail_out_of_bounds(Ctx& ctx, const Ins& ins, int lane, u64 a, int n, const char* what) {
  u64 best = ~0ull;
  const Alloc* nearest = nullptr;
  bool after = false;
  for (auto& x : ctx.launch->allocs) {
    bool past = a >= x.lo;
    u64 distance = a >= x.hi ? a - x.hi : a + n <= x.lo ? x.lo - a : 0;
    if (distance < best) {
      best = distance;
      nearest = &x;
      after = past;
    }
  }
  std::string near = "no tensors were passed";
  if (nearest)
    near = fmt("nearest tensor: %s [0x%llx, 0x%llx) %llu bytes; the access is %llu bytes %s",
               nearest->id < (int)ctx.launch->names.size() ? ctx.launch->names[nearest->id].c_str() : "?", (ull)nearest->lo,
               (ull)nearest->hi, (ull)(nearest->hi - nearest->lo), (ull)best, after ? "past its end" : "before its start");
  fail(ctx, ins, lane, fmt("out-of-bounds global %s of %d bytes at address 0x%llx (%s)", what, n, (ull)a, near.c_str()));
}

// Offset of a shared address, which may be generic.
INLINE u64 shared_offset(u64 a) { return in_window(a, SHARED_BASE) ? a - SHARED_BASE : a; }

// ---------------------------------------------------------------- global memory between CTAs
// CTAs of a launch have no order, so a conflict is a race whatever the distance in time; atomics are exempt, and order
// nothing.
static void check_global_race(Ctx& ctx, const Ins& ins, int lane, const Alloc* alloc, u64 a, int n, int rw, const char* what) {
  u32 me = (u32)ctx.cta->linear + 1;
  u64 begin = a - alloc->lo;
  for (u64 o = begin; o < begin + n; o++) {
    u32 writer = alloc->cta_wrote[o], reader = alloc->cta_read[o];
    if (writer && writer != me)
      fail(ctx, ins, lane,
           fmt("global-memory race between CTAs: %s of address 0x%llx (%s, byte offset %llu), which linear CTA %u wrote at PTX "
               "line %d in the same launch without atomics",
               what, (ull)a, ctx.launch->names[alloc->id].c_str(), (ull)o, writer - 1, alloc->line_wrote[o]));
    if ((rw & RW_W) && reader && reader != me)
      fail(ctx, ins, lane,
           fmt("global-memory race between CTAs: %s of address 0x%llx (%s, byte offset %llu), which linear CTA %u%s read in "
               "the same launch",
               what, (ull)a, ctx.launch->names[alloc->id].c_str(), (ull)o, (reader == ~0u ? 0 : reader - 1),
               reader == ~0u ? " and others" : ""));
    if (rw & RW_W) {
      alloc->cta_wrote[o] = me;
      alloc->line_wrote[o] = ins.line;
    }
    if (rw & RW_R) alloc->cta_read[o] = reader && reader != me ? ~0u : me;
  }
}

// ---------------------------------------------------------------- shared memory between warps
[[noreturn]] static void fail_race(Ctx& ctx, const Ins& ins, int lane, u32 a, const char* kind, int other, int other_line) {
  fail(ctx, ins, lane,
       fmt("shared-memory race (%s) at shared offset %u: conflicts with the access of warp %d at PTX line %d `%s` with no "
           "barrier in between",
           kind, a, other, other_line, ptx_text(*ctx.prog, other_line).c_str()));
}

// Which rule the access breaks at byte b. These say what the loops below test; only a broken rule gets here.
[[noreturn]] static void fail_shared_read(Ctx& ctx, const Ins& ins, int lane, u32 a, int n, bool may_be_uninitialised) {
  Shadow& s = ctx.cta->shadow;
  const Config& config = ctx.launch->config;
  int me = ctx.warp->id;
  for (u32 b = a; b < a + n; b++) {
    if (config.check_race && s.pending[b])
      fail(ctx, ins, lane,
           fmt("shared memory read at offset %u while a cp.async to it is still in flight (no cp.async.wait_group)", b));
    if (config.check_init && !s.init[b] && !may_be_uninitialised)
      fail(ctx, ins, lane, fmt("read of uninitialised shared memory at offset %u", b));
    if (config.check_race && s.clock[me * s.warps + s.write_warp[b]] < s.write_clock[b])
      fail_race(ctx, ins, lane, b, "read after write", s.write_warp[b], s.write_line[b]);
  }
  std::abort();
}
[[noreturn]] static void fail_shared_write(Ctx& ctx, const Ins& ins, int lane, u32 a, int n, const u8* value) {
  Shadow& s = ctx.cta->shadow;
  const u32* clock = &s.clock[ctx.warp->id * s.warps];
  for (u32 b = a; b < a + n; b++) {
    bool changes = !(value && value[b - a] == ctx.cta->shared[b]);
    if (clock[s.write_warp[b]] < s.write_clock[b] && changes)
      fail_race(ctx, ins, lane, b, "write after write", s.write_warp[b], s.write_line[b]);
    for (int w = 0; w < s.warps; w++)
      if (s.last_reads(w)[b] > clock[w])
        fail_race(ctx, ins, lane, b, "write after read", w, s.read_line[b]);
    if (s.pending[b] && value)
      fail(ctx, ins, lane, fmt("shared memory write at offset %u while a cp.async to it is in flight", b));
  }
  std::abort();
}

// A warp is never behind its own accesses, so comparing clocks needs no exception for it. The pointers are local because
// stores of bytes could otherwise change the vectors for all the compiler knows.
static void check_shared_read(Ctx& ctx, const Ins& ins, int lane, u32 a, int n, bool may_be_uninitialised = false) {
  Shadow& s = ctx.cta->shadow;
  const Config& config = ctx.launch->config;
  bool bad = false;
  if (config.check_init && !may_be_uninitialised) {
    const u8* init = &s.init[a];
    for (int k = 0; k < n; k++) bad |= !init[k];
  }
  if (!config.check_race) {
    if (bad) fail_shared_read(ctx, ins, lane, a, n, may_be_uninitialised);
    return;
  }
  int me = ctx.warp->id, warps = s.warps;
  const u8 *pending = &s.pending[a], *write_warp = &s.write_warp[a];
  const u32 *clock = &s.clock[me * warps], *write_clock = &s.write_clock[a];
  for (int k = 0; k < n; k++) bad |= pending[k] | (clock[write_warp[k]] < write_clock[k]);
  if (bad) fail_shared_read(ctx, ins, lane, a, n, may_be_uninitialised);
  std::fill_n(s.last_reads(me) + a, n, clock[me]);
  std::fill_n(&s.read_line[a], n, ins.line);
}

// `value`: the bytes that are written, null where they are not known yet (an asynchronous copy). Two warps that write the
// same value are no harm: Triton does that for replicated layouts.
static void check_shared_write(Ctx& ctx, const Ins& ins, int lane, u32 a, int n, const u8* value) {
  Shadow& s = ctx.cta->shadow;
  const Config& config = ctx.launch->config;
  if (config.check_init) memset(&s.init[a], 1, n);
  if (!config.check_race) return;
  int me = ctx.warp->id, warps = s.warps;
  const u8 *pending = &s.pending[a], *write_warp = &s.write_warp[a], *shared = &ctx.cta->shared[a];
  const u32 *clock = &s.clock[me * warps], *write_clock = &s.write_clock[a];
  bool bad = false;
  for (int k = 0; k < n; k++) {
    bad |= clock[write_warp[k]] < write_clock[k] && !(value && value[k] == shared[k]);
    bad |= pending[k] && value;
  }
  for (int w = 0; w < warps; w++) {
    const u32 *reads = s.last_reads(w) + a, seen = clock[w];
    for (int k = 0; k < n; k++) bad |= reads[k] > seen;
  }
  if (bad) fail_shared_write(ctx, ins, lane, a, n, value);
  memset(&s.write_warp[a], me, n);
  std::fill_n(&s.write_clock[a], n, clock[me]);
  std::fill_n(&s.write_line[a], n, ins.line);
}

INLINE void join_clocks(u32* into, const u32* from, int n) {
  for (int k = 0; k < n; k++) into[k] = std::max(into[k], from[k]);
}

static void reset_shadow(Shadow& s, const Config& config, int warps) {
  size_t n = config.shared;
  s.warps = warps;
  if (config.check_init) s.init.assign(n, 0);
  if (!config.check_race) return;
  s.pending.assign(n, 0);
  s.write_clock.assign(n, 0);
  s.write_warp.assign(n, 0);
  s.read_clock.assign(n * warps, 0);
  s.write_line.assign(n, 0);
  s.read_line.assign(n, 0);
  s.mbar_clock.clear();
  s.clock.assign(warps * warps, 0);
  for (int w = 0; w < warps; w++) s.clock[w * warps + w] = 1;
}
