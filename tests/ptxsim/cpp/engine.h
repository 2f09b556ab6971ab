// Execution: a warp steps through the code until it waits, the warps of a CTA take turns, threads share out the CTAs.
#pragma once
#include <algorithm>

#include "checks.h"

// ---------------------------------------------------------------- divergence
// Lanes that go different ways are groups with a pc each. The group with the smallest pc runs, and groups merge when their
// pcs meet: code is laid out so that the join of a branch comes after both sides.
static void update_min_split(Warp& w) {
  w.min_split = NO_SPLIT;
  for (auto& s : w.splits)
    if (!s.wait) w.min_split = std::min(w.min_split, s.pc);
}
static void push_split(Warp& w, int pc, u32 mask, bool wait) {
  w.splits.push_back({pc, mask, wait});
  update_min_split(w);
}
// Merges all groups at `pc` into the active one.
static bool gather(Warp& w, int pc) {
  bool any = false;
  for (int k = (int)w.splits.size() - 1; k >= 0; k--) {
    if (w.splits[k].pc != pc) continue;
    w.active |= w.splits[k].mask;
    w.splits.erase(w.splits.begin() + k);
    any = true;
  }
  if (any) update_min_split(w);
  return any;
}
// Makes the group that can run and has the smallest pc the active one; false if all of them wait.
static bool pick(Warp& w) {
  w.active = 0;
  update_min_split(w);
  if (w.min_split == NO_SPLIT) return false;
  w.pc = w.min_split;
  gather(w, w.pc);
  return true;
}
// Parks the active group at `pc` until other lanes come there.
static bool wait_for_lanes(Warp& w, int pc) {
  if (gather(w, pc)) return true;
  w.splits.push_back({pc, w.active, true});
  return pick(w);
}

// When lanes exit, groups that wait need fewer and have to look again.
static void stop_waiting(Warp& w) {
  for (auto& s : w.splits) s.wait = false;
  update_min_split(w);
}

// ---------------------------------------------------------------- one warp
enum Stop { S_BARRIER, S_DONE, S_YIELD };

[[noreturn]] static void fail_deadlock(Ctx& ctx, Warp& w) {
  const Program& P = *ctx.prog;
  std::string s;
  for (auto& q : w.splits)
    s += fmt("\n    lanes 0x%08x wait at PTX line %d `%s`", q.mask, P.code[q.pc].line, ptx_text(P, P.code[q.pc].line).c_str());
  ctx.mask = FULL;
  fail(ctx, P.code[w.splits.empty() ? w.pc : w.splits[0].pc], -1,
       "warp deadlock: lanes of one warp wait at different .sync/barrier instructions" + s);
}

// list: a target per index, count of them
static int branch_indexed(Ctx& ctx, Warp& w, const Ins& ins, Stat& stat, int pc, u32 m) {
  if (!m) return pc + 1;
  u32* index = lanes<u32>(ctx, ins.slot[0]);
  const u32* targets = &ctx.prog->lists[ins.list];
  u32 stay = w.active & ~m;
  if (stay) push_split(w, pc + 1, stay, false);
  std::vector<Split> groups;
  EACH_ACTIVE(i, m) {
    if (index[i] >= ins.count) fail(ctx, ins, i, "brx.idx index out of range");
    int target = (int)targets[index[i]];
    auto it = std::find_if(groups.begin(), groups.end(), [&](const Split& g) { return g.pc == target; });
    if (it == groups.end()) groups.push_back({target, 1u << i, false});
    else it->mask |= 1u << i;
  }
  w.active = groups[0].mask;
  stat.divergent += groups.size() - 1;
  w.splits.insert(w.splits.end(), groups.begin() + 1, groups.end());
  update_min_split(w);
  return groups[0].pc;
}

static void arrive_at_barrier(Ctx& ctx, Warp& w, const Ins& ins, u32 m) {
  int lane = __builtin_ctz(m);
  w.bar = (int)lanes<u32>(ctx, ins.slot[0])[lane];
  w.bar_count = ins.flag ? lanes<u32>(ctx, ins.slot[1])[lane] : 0;
  w.bar_arrive = ins.mode == BAR_ARRIVE;
  w.bar_pred = ins.mode >= BAR_POPC ? (w.preds[ins.pred1] ^ (ins.mode2 ? FULL : 0)) & m : 0;
  w.state = W_AT_BARRIER;
}

static Stop run_warp(Ctx& ctx, Warp& w) {
  const Ins* code = ctx.prog->code.data();
  ctx.warp = &w;
  ctx.base = w.base;
  ctx.preds = w.preds;
  const u64 slice = ctx.launch->config.slice, max_instr = ctx.launch->config.max_instr;
  u64 limit = w.icount + slice;
  int pc = w.pc;
  if (!w.active) {
    if (w.splits.empty()) {
      w.state = W_DONE;
      return S_DONE;
    }
    if (!pick(w)) fail_deadlock(ctx, w);
    pc = w.pc;
  }
  for (;;) {
    if (__builtin_expect(pc >= w.min_split, 0)) {
      w.splits.push_back({pc, w.active, false});
      if (!pick(w)) fail_deadlock(ctx, w);
      pc = w.pc;
    }
    const Ins& ins = code[pc];
    u32 m = w.active;
    if (ins.guard >= 0) m &= ins.guard_negated ? ~w.preds[ins.guard] : w.preds[ins.guard];
    Stat& stat = ctx.stats[pc];
    stat.exec++;
    stat.lanes += (u32)__builtin_popcount(m);
    auto not_yet = [&] {  // counted again when it runs
      stat.exec--;
      stat.lanes -= (u32)__builtin_popcount(m);
    };
    if (__builtin_expect(++w.icount >= limit, 0)) {
      if (w.icount > max_instr) {
        ctx.mask = m;
        w.pc = pc;
        fail(ctx, ins, -1,
             fmt("instruction limit (%llu warp-instructions in one warp) exceeded: endless loop?", (ull)max_instr));
      }
      if (ins.kind == K_NORMAL || ins.kind == K_BRA) {
        w.pc = pc;
        not_yet();
        w.icount--;
        return S_YIELD;
      }
    }
    switch (ins.kind) {
      case K_NORMAL:
        pc++;
        if (!m) break;
        ctx.mask = m;
        ctx.stat = &stat;
        ctx.clock = w.icount;
        ins.fn(ctx, ins);
        if (__builtin_expect(ctx.yield, 0)) {
          ctx.yield = false;
          w.pc = pc;
          return S_YIELD;
        }
        break;
      case K_NOP: pc++; break;
      case K_BRA: {
        u32 fall_through = w.active & ~m;
        if (!fall_through) {
          pc = ins.target;
        } else if (m == 0) {
          pc++;
        } else {
          stat.divergent++;
          bool forward = ins.target < pc + 1;
          int now = forward ? ins.target : pc + 1, later = forward ? pc + 1 : ins.target;
          w.active = forward ? m : fall_through;
          push_split(w, later, forward ? fall_through : m, false);
          pc = now;
        }
        break;
      }
      case K_BRX: pc = branch_indexed(ctx, w, ins, stat, pc, m); break;
      case K_SYNC: {
        u32 need = w.valid & ~w.exited;
        if (ins.members >= 0) need &= lanes<u32>(ctx, (u32)ins.members)[__builtin_ctz(w.active)];
        if (__builtin_expect((w.active & need) != need, 0)) {
          not_yet();
          w.pc = pc;
          if (!wait_for_lanes(w, pc)) fail_deadlock(ctx, w);
          pc = w.pc;
          break;
        }
        pc++;
        if (!m) break;
        ctx.mask = m;
        ctx.stat = &stat;
        ins.fn(ctx, ins);
        break;
      }
      case K_BAR:
        if (m == 0) {
          pc++;
        } else if (m == (w.valid & ~w.exited)) {
          arrive_at_barrier(ctx, w, ins, m);
          w.pc = pc + 1;
          return S_BARRIER;
        } else {
          if (m != w.active) {
            ctx.mask = m;
            fail(ctx, ins, -1, fmt("divergent barrier: predicated on only part of the warp (mask 0x%08x)", m));
          }
          not_yet();
          w.pc = pc;
          if (!wait_for_lanes(w, pc)) fail_deadlock(ctx, w);
          pc = w.pc;
        }
        break;
      case K_EXIT:
        w.exited |= m;
        w.active &= ~m;
        if (w.active) {
          pc++;
          break;
        }
        if (w.splits.empty()) {
          w.state = W_DONE;
          return S_DONE;
        }
        if (!pick(w)) {
          stop_waiting(w);
          pick(w);
        }
        stop_waiting(w);
        pc = w.pc;
        break;
      case K_TRAP:
        if (m) {
          ctx.mask = m;
          ins.fn(ctx, ins);
        }
        pc++;
        break;
    }
  }
}

// ---------------------------------------------------------------- one CTA
static void fill_lanes(u8* slot, int width, int lane, u64 value) {
  if (width == 8) ((u64*)slot)[lane] = value;
  else if (width == 4) ((u32*)slot)[lane] = (u32)value;
  else ((u16*)slot)[lane] = (u16)value;
}

static const u32 MULTIPROCESSORS = 108;
static u64 special_value(const Program::Special& special, const Config& c, const CTA& t, u32 warp, u32 warps, int lane) {
  u32 thread = warp * 32 + lane;
  switch (special.kind) {
    case SR_TID:
      return special.dim == 0   ? thread % c.block[0]
             : special.dim == 1 ? thread / c.block[0] % c.block[1]
                                : thread / c.block[0] / c.block[1];
    case SR_NTID: return c.block[special.dim];
    case SR_CTAID: return t.id[special.dim];
    case SR_NCTAID: return c.grid[special.dim];
    case SR_LANEID: return lane;
    case SR_WARPID: return warp;
    case SR_NWARPID: return warps;
    case SR_SMID: return t.linear % MULTIPROCESSORS;
    case SR_NSMID: return MULTIPROCESSORS;
    case SR_LANEMASK_EQ: return 1u << lane;
    case SR_LANEMASK_LT: return (1u << lane) - 1;
    case SR_LANEMASK_LE: return (2ull << lane) - 1;
    case SR_LANEMASK_GT: return ~((2ull << lane) - 1) & FULL;
    case SR_LANEMASK_GE: return ~((1ull << lane) - 1) & FULL;
    case SR_SHARED_SIZE: return c.shared;
    case SR_ONE: return 1;
    case SR_ZERO: return 0;
  }
  return 0;
}

static void allocate_cta(const Launch& L, CTA& t, u32 threads, u32 warps) {
  const Program& P = *L.prog;
  size_t arena = (P.arena + 63) & ~63ull, local = (size_t)P.local_bytes * 32;
  t.shared.resize(L.config.shared);
  t.arena.resize(arena * warps + 64);
  t.preds.assign((size_t)P.npred * warps + 1, 0);
  t.local.resize(local * warps + 1);
  t.warps.resize(warps);
  u8* base = (u8*)(((uintptr_t)t.arena.data() + 63) & ~(uintptr_t)63);
  memset(base, 0, arena * warps);
  for (u32 w = 0; w < warps; w++) {
    Warp& W = t.warps[w];
    W.base = base + arena * w;
    W.preds = t.preds.data() + (size_t)P.npred * w;
    W.local = t.local.data() + local * w;
    W.id = (int)w;
    u32 left = threads - w * 32;
    W.valid = left >= 32 ? FULL : (1u << left) - 1;
    for (auto& k : P.constants) EACH_LANE(i) fill_lanes(W.base + k.off, k.width, i, k.value);
  }
}

// Registers keep what the previous CTA left in them, as on a GPU.
static void setup_cta(const Launch& L, CTA& t, u64 linear, bool first) {
  const Config& c = L.config;
  u32 threads = c.block[0] * c.block[1] * c.block[2], warps = (threads + 31) / 32;
  t.linear = linear;
  t.id[0] = linear % c.grid[0];
  t.id[1] = linear / c.grid[0] % c.grid[1];
  t.id[2] = (u32)(linear / c.grid[0] / c.grid[1]);
  if (first) allocate_cta(L, t, threads, warps);
  memset(t.shared.data(), 0xA5, t.shared.size());  // poison: garbage, never zero
  for (u32 w = 0; w < warps; w++) {
    Warp& W = t.warps[w];
    W.pc = 0;
    W.active = W.valid;
    W.exited = W.carry = 0;
    W.splits.clear();
    W.min_split = NO_SPLIT;
    W.state = W_RUNS;
    W.copy_groups.clear();
    W.copy_open.clear();
    W.wgmma_groups.clear();
    W.wgmma_open.clear();
    W.icount = 0;
    for (auto& k : L.prog->specials)
      EACH_LANE(i) fill_lanes(W.base + k.off, k.width, i, special_value(k, c, t, w, warps, i));
  }
  reset_shadow(t.shadow, c, (int)warps);
}

// ---------------------------------------------------------------- barriers
// A bar.arrive of a warp, which runs on: {barrier, warp}
typedef std::vector<std::pair<int, int>> Arrivals;

static void release_barrier(Ctx& ctx, CTA& t, const std::vector<int>& waiting) {
  u32 any = 0, all = 1, count = 0;
  for (int x : waiting) {
    Warp& W = t.warps[x];
    count += __builtin_popcount(W.bar_pred);
    any |= W.bar_pred != 0;
    all &= W.bar_pred == (W.valid & ~W.exited);
  }
  for (int x : waiting) {
    Warp& W = t.warps[x];
    const Ins& ins = ctx.prog->code[W.pc - 1];
    if (ins.mode == BAR_POPC) {
      u32* d = (u32*)(W.base + ins.slot[2]);
      EACH_LANE(i) d[i] = count;
    } else if (ins.mode > BAR_POPC) {
      W.preds[ins.pred0] = (ins.mode == BAR_AND ? all : any) ? FULL : 0;
    }
    W.state = W_RUNS;
    W.bar = -1;
  }
  if (!ctx.launch->config.check_race) return;
  Shadow& s = t.shadow;
  std::vector<u32> joined(s.warps, 0);
  for (int x : waiting) join_clocks(joined.data(), &s.clock[x * s.warps], s.warps);
  for (int x : waiting) {
    std::copy(joined.begin(), joined.end(), &s.clock[x * s.warps]);
    s.clock[x * s.warps + x]++;
  }
}

// Whether some barrier had all its warps.
static bool release_full_barriers(Ctx& ctx, CTA& t, Arrivals& arrived) {
  bool any = false;
  for (int id = 0; id < 16; id++) {
    std::vector<int> waiting;
    u64 threads = 0, wanted = 0, alive = 0;
    for (auto& W : t.warps) {
      if (W.state != W_DONE) alive += 32;
      if (W.state != W_AT_BARRIER || W.bar != id) continue;
      waiting.push_back(W.id);
      threads += 32;
      if (W.bar_count) wanted = W.bar_count;
    }
    if (waiting.empty()) continue;
    for (auto& a : arrived)
      if (a.first == id) threads += 32;
    if (threads < (wanted ? wanted : alive)) continue;
    if (ctx.launch->config.check_race) {
      Shadow& s = t.shadow;
      for (int x : waiting)
        for (auto& a : arrived)
          if (a.first == id) join_clocks(&s.clock[x * s.warps], &s.clock[a.second * s.warps], s.warps);
    }
    auto here = [id](const std::pair<int, int>& a) { return a.first == id; };
    arrived.erase(std::remove_if(arrived.begin(), arrived.end(), here), arrived.end());
    release_barrier(ctx, t, waiting);
    any = true;
  }
  return any;
}

static u64 random_next(u64& s) {
  s ^= s << 13;
  s ^= s >> 7;
  s ^= s << 17;
  return s;
}
template <class T> static void shuffle(std::vector<T>& v, u64& seed) {
  for (size_t k = v.size(); k > 1; k--) std::swap(v[k - 1], v[random_next(seed) % k]);
}

static void run_cta(Ctx& ctx, CTA& t) {
  ctx.cta = &t;
  const Config& c = ctx.launch->config;
  int warps = (int)t.warps.size();
  Arrivals arrived;
  u64 seed = (c.seed + 1) * 0x9E3779B97F4A7C15ull ^ (t.linear * 7919 + 1);
  std::vector<int> order(warps);
  for (int w = 0; w < warps; w++) order[w] = c.warp_order == ORDER_REVERSE ? warps - 1 - w : w;
  for (;;) {
    bool progress = false, alive = false;
    if (c.warp_order == ORDER_RANDOM) shuffle(order, seed);
    for (int w : order) {
      Warp& W = t.warps[w];
      if (W.state == W_DONE) continue;
      alive = true;
      if (W.state != W_RUNS) continue;
      progress = true;
      if (run_warp(ctx, W) == S_BARRIER && W.bar_arrive) {
        arrived.push_back({W.bar, W.id});
        W.state = W_RUNS;
        W.bar = -1;
      }
    }
    if (!alive) return;
    if (release_full_barriers(ctx, t, arrived) || progress) continue;
    std::string s = fmt("ptxsim: kernel '%s': barrier deadlock in CTA (%u,%u,%u):", ctx.prog->name.c_str(), t.id[0], t.id[1],
                        t.id[2]);
    for (auto& W : t.warps) {
      std::string does = W.state == W_DONE ? "exited" : fmt("waits at barrier %d", W.bar);
      s += fmt("\n    warp %d: %s at PTX line %d", W.id, does.c_str(), ctx.prog->code[W.pc ? W.pc - 1 : 0].line);
    }
    throw SimError(s);
  }
}

// ---------------------------------------------------------------- the grid
// One thread's share of the CTAs; the first error stops all threads.
static void worker(Launch* L, Stat* stats) {
  auto ctx = std::make_unique<Ctx>();
  ctx->prog = L->prog;
  ctx->launch = L;
  ctx->stats = stats;
  const Config& c = L->config;
  CTA t;
  u64 n = c.cta_end - c.cta_begin, seed = c.seed * 77777ull + 12345;
  std::vector<u32> order;
  if (c.cta_order == ORDER_RANDOM) {
    for (u64 i = 0; i < n; i++) order.push_back((u32)i);
    shuffle(order, seed);
  }
  try {
    for (bool first = true; !L->stop.load(); first = false) {
      u64 k = L->next.fetch_add(1);
      if (k >= n) break;
      u64 index = c.cta_order == ORDER_REVERSE ? n - 1 - k : c.cta_order == ORDER_RANDOM ? order[k] : k;
      setup_cta(*L, t, c.cta_begin + index, first);
      run_cta(*ctx, t);
    }
  } catch (std::exception& e) {
    std::lock_guard<std::mutex> guard(L->error_mutex);
    if (L->error.empty()) L->error = e.what();
    L->stop = true;
  }
}
