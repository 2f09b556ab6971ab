// Loads, stores, asynchronous copies and atomics: addresses to host pointers, checked and counted.
#pragma once
#include "checks.h"
#include "counters.h"

// ---------------------------------------------------------------- addresses
// slot[1]: address register of addr_size bytes (0: none), imm: offset.
INLINE void addresses(Ctx& ctx, const Ins& ins, u64* address) {
  if (ins.addr_size == 8) {
    const u64* a = lanes<u64>(ctx, ins.slot[1]);
    EACH_LANE(i) address[i] = a[i] + (u64)ins.imm;
  } else if (ins.addr_size == 4) {
    const u32* a = lanes<u32>(ctx, ins.slot[1]);
    EACH_LANE(i) address[i] = (u32)(a[i] + (u32)ins.imm);
  } else {
    EACH_LANE(i) address[i] = (u64)ins.imm;
  }
}

// One access of n bytes per lane of `mask`; `bytes` are fewer per lane where given, and 0 touches nothing.
static void global_access(Ctx& ctx, const Ins& ins, const u64* address, int n, u32 mask, int rw, u8** p, const char* what,
                          const u8* bytes = nullptr) {
  bool stats = ctx.launch->config.stats;
  u64 previous = ~0ull;
  u32 sectors = 0, total = 0;
  const Alloc* alloc = ctx.last;
  if (stats) ctx.stamp++;
  EACH_ACTIVE(i, mask) {
    u64 a = address[i];
    int k = bytes ? bytes[i] : n;
    if (a & (u64)(n - 1)) fail(ctx, ins, i, fmt("misaligned global %s of %d bytes at address 0x%llx", what, n, (ull)a));
    p[i] = (u8*)a;
    if (k == 0) continue;
    if (!alloc || a < alloc->lo || a + k > alloc->hi) {
      alloc = find_alloc(ctx, a, k);
      if (!alloc) fail_out_of_bounds(ctx, ins, i, a, k, what);
    }
    total += k;
    if (__builtin_expect(alloc->cta_wrote != nullptr, 0) && ins.cls != C_ATOM)
      check_global_race(ctx, ins, i, alloc, a, k, rw, what);
    if (!stats) continue;
    for (u64 sector = a >> 5; sector <= (a + k - 1) >> 5; sector++) {
      if (sector == previous) continue;
      previous = sector;
      if (!first_touch(ctx, sector)) continue;
      sectors++;
      mark_sector(alloc, sector, rw & RW_R, rw & RW_W);
    }
  }
  ctx.last = alloc;
  if (!stats) return;
  ctx.stat->bytes += total;
  ctx.stat->sectors += sectors;
  ctx.stat->ideal += std::min((total + 31) / 32, sectors);
}

static void shared_access(Ctx& ctx, const Ins& ins, const u64* address, int n, u32 mask, int rw, u8** p, const char* what) {
  u64 size = ctx.cta->shared.size();
  u8* base = ctx.cta->shared.data();
  EACH_ACTIVE(i, mask) {
    u64 a = shared_offset(address[i]);
    if (a & (u64)(n - 1)) fail(ctx, ins, i, fmt("misaligned shared %s of %d bytes at offset %llu", what, n, (ull)a));
    if (a + n > size)
      fail(ctx, ins, i,
           fmt("out-of-bounds shared %s of %d bytes at offset %llu (shared memory of the CTA: %llu bytes)", what, n, (ull)a,
               (ull)size));
    p[i] = base + a;
  }
  if (ctx.launch->config.stats) {
    ctx.stat->bytes += (u64)__builtin_popcount(mask) * n;
    count_banks(ctx, address, n, mask);
  }
  if ((rw & RW_R) && ctx.shadowed()) {
    EACH_ACTIVE(i, mask) check_shared_read(ctx, ins, i, (u32)(p[i] - base), n);
  }
}

static void local_access(Ctx& ctx, const Ins& ins, const u64* address, int n, u32 mask, u8** p) {
  u32 size = ctx.prog->local_bytes;
  EACH_ACTIVE(i, mask) {
    u64 a = in_window(address[i], LOCAL_BASE) ? address[i] - LOCAL_BASE : address[i];
    if (a + n > size) fail(ctx, ins, i, "out-of-bounds local access");
    p[i] = ctx.warp->local + (size_t)i * size + a;
  }
}

// Host pointers of the active lanes' accesses. Writes to shared memory are checked by the caller, who knows the values.
static void resolve(Ctx& ctx, const Ins& ins, const u64* address, int n, int rw, u8** p, const char* what) {
  u32 mask = ctx.mask;
  switch (ins.space) {
    case SP_GLOBAL: case SP_CONST: global_access(ctx, ins, address, n, mask, rw, p, what); return;
    case SP_SHARED: shared_access(ctx, ins, address, n, mask, rw, p, what); return;
    case SP_LOCAL: local_access(ctx, ins, address, n, mask, p); return;
    default: break;
  }
  u32 shared = 0, local = 0;
  EACH_ACTIVE(i, mask) {
    if (in_window(address[i], SHARED_BASE)) shared |= 1u << i;
    else if (in_window(address[i], LOCAL_BASE)) local |= 1u << i;
  }
  u32 global = mask & ~shared & ~local;
  if (global) global_access(ctx, ins, address, n, global, rw, p, what);
  if (shared) shared_access(ctx, ins, address, n, shared, rw, p, what);
  if (local) local_access(ctx, ins, address, n, local, p);
}

// ---------------------------------------------------------------- ld, st
template <class Mem, class Reg> INLINE void load_as(Ctx& ctx, const Ins& ins, u8** p) {
  const u32* dst = &ctx.prog->lists[ins.list];
  u32 m = ctx.mask;
  for (int k = 0; k < ins.count; k++) {
    if (dst[k] == NO_SLOT) continue;
    Reg* d = lanes<Reg>(ctx, dst[k]);
    EACH_ACTIVE(i, m) {
      Mem x;
      memcpy(&x, p[i] + k * sizeof(Mem), sizeof(Mem));
      d[i] = (Reg)x;
    }
  }
}
static constexpr int width_key(int elem_size, int reg_size) { return elem_size * 16 + reg_size; }

// list: destinations; sign: extend the sign of elements that are narrower than their registers.
static void h_ld(Ctx& ctx, const Ins& ins) {
  u64 address[32];
  u8* p[32];
  addresses(ctx, ins, address);
  resolve(ctx, ins, address, ins.elem_size * ins.count, RW_R, p, "load");
  if (ins.elem_size == 4 && ins.reg_size == 4 && ctx.mask == FULL) {  // by far the most frequent
    const u32* dst = &ctx.prog->lists[ins.list];
    for (int k = 0; k < ins.count; k++) {
      if (dst[k] == NO_SLOT) continue;
      u32* d = lanes<u32>(ctx, dst[k]);
      EACH_LANE(i) d[i] = *(u32*)(p[i] + 4 * k);
    }
    return;
  }
#define LOAD_CASE(U, S, RU, RS) \
  case width_key(sizeof(U), sizeof(RU)): ins.sign ? load_as<S, RS>(ctx, ins, p) : load_as<U, RU>(ctx, ins, p); return;
  switch (width_key(ins.elem_size, ins.reg_size)) {
    LOAD_CASE(u8, s8, u16, s16)
    LOAD_CASE(u8, s8, u32, s32)
    LOAD_CASE(u8, s8, u64, s64)
    LOAD_CASE(u16, s16, u16, s16)
    LOAD_CASE(u16, s16, u32, s32)
    LOAD_CASE(u16, s16, u64, s64)
    LOAD_CASE(u32, s32, u32, s32)
    LOAD_CASE(u32, s32, u64, s64)
    LOAD_CASE(u64, s64, u64, s64)
  }
  fail(ctx, ins, -1, "unsupported load width");
}

template <class Mem, class Reg> INLINE void store_as(Ctx& ctx, const Ins& ins, u8** p) {
  const u32* src = &ctx.prog->lists[ins.list];
  u32 m = ctx.mask;
  EACH_ACTIVE(i, m) {
    for (int k = 0; k < ins.count; k++) {
      Mem x = (Mem)lanes<Reg>(ctx, src[k])[i];
      memcpy(p[i] + k * sizeof(Mem), &x, sizeof(Mem));
    }
  }
}

// Lanes of one warp may store to one address: the last lane's value stays, so only that one counts for the race check.
static void check_shared_stores(Ctx& ctx, const Ins& ins, u8* const* p, int n) {
  u8* base = ctx.cta->shared.data();
  size_t size = ctx.cta->shared.size();
  auto in_shared = [&](int i) { return on(ctx.mask, i) && p[i] >= base && p[i] < base + size; };
  u8 value[32][32];
  EACH_LANE(i) {
    if (!in_shared(i)) continue;
    for (int k = 0; k < ins.count; k++) {
      u64 x = 0;
      memcpy(&x, ctx.base + ctx.prog->lists[ins.list + k] + (size_t)i * ins.reg_size, ins.reg_size);
      memcpy(value[i] + k * ins.elem_size, &x, ins.elem_size);
    }
  }
  EACH_LANE(i) {
    if (!in_shared(i)) continue;
    int later = i + 1;
    while (later < 32 && !(on(ctx.mask, later) && p[later] == p[i])) later++;
    if (later == 32) check_shared_write(ctx, ins, i, (u32)(p[i] - base), n, value[i]);
    else if (memcmp(value[i], value[later], n)) ctx.stat->divergent++;
  }
}

static void h_st(Ctx& ctx, const Ins& ins) {
  u64 address[32];
  u8* p[32];
  addresses(ctx, ins, address);
  int n = ins.elem_size * ins.count;
  resolve(ctx, ins, address, n, RW_W, p, "store");
  if (ctx.shadowed() && (ins.space == SP_SHARED || ins.space == SP_GENERIC)) check_shared_stores(ctx, ins, p, n);
#define STORE_CASE(M, R) \
  case width_key(sizeof(M), sizeof(R)): store_as<M, R>(ctx, ins, p); return;
  switch (width_key(ins.elem_size, ins.reg_size)) {
    STORE_CASE(u8, u16)
    STORE_CASE(u8, u32)
    STORE_CASE(u8, u64)
    STORE_CASE(u16, u16)
    STORE_CASE(u16, u32)
    STORE_CASE(u16, u64)
    STORE_CASE(u32, u32)
    STORE_CASE(u32, u64)
    STORE_CASE(u64, u64)
  }
  fail(ctx, ins, -1, "unsupported store width");
}

// imm: offset in the parameter block.
static void h_ldparam(Ctx& ctx, const Ins& ins) {
  const u32* dst = &ctx.prog->lists[ins.list];
  const u8* p = ctx.launch->params.data() + ins.imm;
  u32 m = ctx.mask;
  if ((size_t)(ins.imm + ins.elem_size * ins.count) > ctx.launch->params.size()) fail(ctx, ins, -1, "ld.param out of range");
  for (int k = 0; k < ins.count; k++) {
    u64 x = 0;
    memcpy(&x, p + k * ins.elem_size, ins.elem_size);
    int bits = ins.elem_size * 8;
    if (ins.sign && bits < 64 && ((x >> (bits - 1)) & 1)) x |= ~(u64)0 << bits;
    if (ins.reg_size == 4) {
      u32* d = lanes<u32>(ctx, dst[k]);
      EACH_ACTIVE(i, m) d[i] = (u32)x;
    } else if (ins.reg_size == 8) {
      u64* d = lanes<u64>(ctx, dst[k]);
      EACH_ACTIVE(i, m) d[i] = x;
    } else {
      u16* d = lanes<u16>(ctx, dst[k]);
      EACH_ACTIVE(i, m) d[i] = (u16)x;
    }
  }
}

// ---------------------------------------------------------------- cp.async
static void land_copy(Ctx& ctx, const CopyOp& op) { memcpy(ctx.cta->shared.data() + op.dst, op.data, op.n); }

// slot[0], reg_size, list: destination register, its width (0: none) and offset; addresses() give the source; count: bytes;
// slot[2]: bytes to read where flag is set, the rest is zero; pred0 (negated with mode): ignore the source.
static void h_cpasync(Ctx& ctx, const Ins& ins) {
  u64 src[32], dst[32];
  u8* p[32];
  u8 bytes[32];
  addresses(ctx, ins, src);
  int n = ins.count;
  u32 m = ctx.mask;
  const Config& config = ctx.launch->config;
  u64 size = ctx.cta->shared.size();
  if (ins.reg_size == 4) {
    const u32* a = lanes<u32>(ctx, ins.slot[0]);
    EACH_LANE(i) dst[i] = (u32)(a[i] + ins.list);
  } else if (ins.reg_size == 8) {
    const u64* a = lanes<u64>(ctx, ins.slot[0]);
    EACH_LANE(i) dst[i] = a[i] + (s64)(s32)ins.list;
  } else {
    EACH_LANE(i) dst[i] = ins.list;
  }
  const u32* src_size = lanes<u32>(ctx, ins.slot[2]);
  u32 ignored = ins.pred0 >= 0 ? ctx.preds[ins.pred0] ^ (ins.mode ? FULL : 0) : 0, reading = 0;
  EACH_LANE(i) {
    bytes[i] = on(ignored, i) ? 0 : (u8)std::min<u32>(ins.flag ? src_size[i] : n, n);
    if (on(m, i) && bytes[i]) reading |= 1u << i;
  }
  global_access(ctx, ins, src, n, reading, RW_R, p, "cp.async read", bytes);
  EACH_ACTIVE(i, m) {
    u64 a = shared_offset(dst[i]);
    if (a & (n - 1)) fail(ctx, ins, i, "misaligned cp.async shared destination");
    if (a + n > size)
      fail(ctx, ins, i, fmt("out-of-bounds cp.async shared destination %llu (size %llu)", (ull)a, (ull)size));
    dst[i] = a;
    CopyOp op;
    op.dst = (u32)a;
    op.n = (u8)n;
    memset(op.data, 0, 16);
    if (bytes[i]) memcpy(op.data, p[i], bytes[i]);
    if (ctx.shadowed()) check_shared_write(ctx, ins, i, (u32)a, n, nullptr);
    if (config.check_race)
      for (int k = 0; k < n; k++) ctx.cta->shadow.pending[a + k]++;
    if (config.cp_early) land_copy(ctx, op);
    ctx.warp->copy_open.push_back(op);
  }
  count_banks(ctx, dst, n, m);
}

static void finish_copies(Ctx& ctx, const Ins& ins, std::vector<CopyOp>& group) {
  Shadow& s = ctx.cta->shadow;
  int me = ctx.warp->id;
  for (auto& op : group) {
    if (!ctx.launch->config.cp_early) land_copy(ctx, op);
    if (!ctx.launch->config.check_race) continue;
    // For the other warps the copy happens here: only a barrier after the wait makes it visible to them.
    for (int k = 0; k < op.n; k++) {
      s.pending[op.dst + k]--;
      s.write_clock[op.dst + k] = s.clock[me * s.warps + me];
      s.write_warp[op.dst + k] = (u8)me;
      s.write_line[op.dst + k] = ins.line;
    }
  }
  group.clear();
}
static void h_cpcommit(Ctx& ctx, const Ins&) {
  ctx.warp->copy_groups.emplace_back(std::move(ctx.warp->copy_open));
  ctx.warp->copy_open.clear();
}
// imm: groups that may stay in flight; mode: wait_all, which takes copies that were not committed too.
static void h_cpwait(Ctx& ctx, const Ins& ins) {
  auto& groups = ctx.warp->copy_groups;
  size_t keep = ins.mode ? 0 : (size_t)ins.imm;
  while (groups.size() > keep) {
    finish_copies(ctx, ins, groups.front());
    groups.erase(groups.begin());
  }
  if (ins.mode) finish_copies(ctx, ins, ctx.warp->copy_open);
}

// ---------------------------------------------------------------- atomics
enum AtomicOp { A_ADD, A_MIN, A_MAX, A_AND, A_OR, A_XOR, A_EXCH, A_CAS, A_INC, A_DEC };
template <class T> INLINE T atomic_int(int op, T old, T b, T swap) {
  typedef typename std::make_unsigned<T>::type U;
  switch (op) {
    case A_ADD: return (T)((U)old + (U)b);
    case A_MIN: return old < b ? old : b;
    case A_MAX: return old > b ? old : b;
    case A_AND: return old & b;
    case A_OR: return old | b;
    case A_XOR: return old ^ b;
    case A_EXCH: return b;
    case A_CAS: return old == b ? swap : old;
    case A_INC: return (U)old >= (U)b ? 0 : old + 1;
    default: return (old == 0 || (U)old > (U)b) ? b : old - 1;
  }
}
template <class T> INLINE T atomic_float(int op, T old, T b) {
  switch (op) {
    case A_ADD: return old + b;
    case A_MIN: return std::fmin(old, b);
    case A_MAX: return std::fmax(old, b);
    default: return b;
  }
}
INLINE u16 atomic_f16(int op, u16 old, u16 b) { return f32_to_f16_rn(atomic_float(op, f16_to_f32(old), f16_to_f32(b))); }
INLINE u16 atomic_bf16(int op, u16 old, u16 b) { return f32_to_bf16_rn(atomic_float(op, bf16_to_f32(old), bf16_to_f32(b))); }

static u64 atomic_value(Type t, int op, u64 old, u64 b, u64 swap) {
  switch (t) {
    // exch and cas of b32 values are written with the type f32 too
    case T_F32: return op >= A_AND ? b : as_bits(atomic_float(op, as_float((u32)old), as_float((u32)b)));
    case T_F64: return bit_cast<u64>(atomic_float(op, bit_cast<double>(old), bit_cast<double>(b)));
    case T_F16: return atomic_f16(op, (u16)old, (u16)b);
    case T_BF16: return atomic_bf16(op, (u16)old, (u16)b);
    case T_F16X2: return atomic_f16(op, (u16)old, (u16)b) | ((u32)atomic_f16(op, (u16)(old >> 16), (u16)(b >> 16)) << 16);
    case T_BF16X2: return atomic_bf16(op, (u16)old, (u16)b) | ((u32)atomic_bf16(op, (u16)(old >> 16), (u16)(b >> 16)) << 16);
    case T_S32: return (u32)atomic_int<s32>(op, (s32)old, (s32)b, (s32)swap);
    case T_U32: case T_B32: return atomic_int<u32>(op, (u32)old, (u32)b, (u32)swap);
    case T_S64: return (u64)atomic_int<s64>(op, (s64)old, (s64)b, (s64)swap);
    case T_U64: case T_B64: return atomic_int<u64>(op, old, b, swap);
    default: return atomic_int<u16>(op, (u16)old, (u16)b, (u16)swap);
  }
}

// mode: AtomicOp, mode2: type, list: destinations (NO_SLOT for red), list2: operands, slot[3]: the new value of cas.
static void h_atom(Ctx& ctx, const Ins& ins) {
  u64 address[32];
  u8* p[32];
  addresses(ctx, ins, address);
  resolve(ctx, ins, address, ins.elem_size * ins.count, RW_R | RW_W, p, "atomic");
  const u32 *dst = &ctx.prog->lists[ins.list], *src = &ctx.prog->lists[ins.list2];
  std::unique_lock<std::mutex> lock(ctx.launch->atomic_mutex, std::defer_lock);
  if (ctx.launch->multithreaded) lock.lock();
  u8* shared = ctx.cta->shared.data();
  bool initialises = ins.space != SP_GLOBAL && ctx.launch->config.check_init;
  EACH_ACTIVE(i, ctx.mask) {
    size_t lane = (size_t)i * ins.reg_size;
    for (int k = 0; k < ins.count; k++) {
      u8* q = p[i] + k * ins.elem_size;
      u64 old = 0, b = 0, swap = 0;
      memcpy(&old, q, ins.elem_size);
      memcpy(&b, ctx.base + src[k] + lane, ins.reg_size);
      if (ins.mode == A_CAS) memcpy(&swap, ctx.base + ins.slot[3] + lane, ins.reg_size);
      u64 value = atomic_value((Type)ins.mode2, ins.mode, old, b, swap);
      memcpy(q, &value, ins.elem_size);
      if (initialises && q >= shared && q < shared + ctx.cta->shared.size())
        memset(&ctx.cta->shadow.init[q - shared], 1, ins.elem_size);
      if (dst[k] != NO_SLOT) memcpy(ctx.base + dst[k] + lane, &old, ins.reg_size);
    }
  }
}

// ---------------------------------------------------------------- address spaces
// mode 0 global, 1 shared, 2 local
static void h_isspacep(Ctx& ctx, const Ins& ins) {
  u32 r = 0;
  const u64* address = lanes<u64>(ctx, ins.slot[0]);
  EACH_LANE(i) {
    bool shared = in_window(address[i], SHARED_BASE), local = in_window(address[i], LOCAL_BASE);
    r |= (u32)(ins.mode == 0 ? (!shared && !local) : ins.mode == 1 ? shared : local) << i;
  }
  put_predicate(ctx, ins.pred0, r);
}
// imm: base of the window; mode 0: to generic, 1: to the space. 32-bit addresses are shared ones and stay.
static void h_cvta(Ctx& ctx, const Ins& ins) {
  if (ins.reg_size == 8) {
    u64 *d = lanes<u64>(ctx, ins.slot[0]), *a = lanes<u64>(ctx, ins.slot[1]), base = (u64)ins.imm;
    EACH_ACTIVE(i, ctx.mask) {
      if (ins.mode) d[i] = (a[i] & ~(WINDOW - 1)) == base ? a[i] - base : a[i];
      else d[i] = a[i] + base;
    }
  } else {
    u32 *d = lanes<u32>(ctx, ins.slot[0]), *a = lanes<u32>(ctx, ins.slot[1]);
    EACH_ACTIVE(i, ctx.mask) d[i] = a[i];
  }
}
