// sm_90: mbarriers, tensor maps, and the copies that TMA makes of boxes of tensors.
#pragma once
#include "mma.h"

// Instructions with several addresses have them as triples in a list: width of the register (0: none), its slot, offset.
INLINE u64 operand_address(Ctx& ctx, const u32* triple, int lane) {
  s64 offset = (s64)(s32)triple[2];
  if (triple[0] == 8) return lanes<u64>(ctx, triple[1])[lane] + (u64)offset;
  if (triple[0] == 4) return (u32)(lanes<u32>(ctx, triple[1])[lane] + (u32)offset);
  return (u64)offset;
}
INLINE u32 shared_address(Ctx& ctx, const Ins& ins, u64 a, u32 n, int lane, u32 alignment) {
  a = shared_offset(a);
  if (a + n > ctx.cta->shared.size() || (a & (alignment - 1)))
    fail(ctx, ins, lane,
         fmt("bad shared address %llu (%u bytes, alignment %u, shared memory %zu bytes)", (ull)a, n, alignment,
             ctx.cta->shared.size()));
  return (u32)a;
}

// ---------------------------------------------------------------- mbarrier
// An encoding of the 8 opaque bytes; the real one is undocumented, and kernels may not look at it.
struct MBar {
  u32 expected, pending;
  s32 tx;
  u32 phase;
};
INLINE MBar mbar_get(Ctx& ctx, u32 a) {
  u64 x;
  memcpy(&x, ctx.cta->shared.data() + a, 8);
  s32 tx = (s32)((u32)(x >> 32) << 1) >> 1;
  return {(u32)(x & 0xffff), (u32)((x >> 16) & 0xffff), tx, (u32)(x >> 63)};
}
INLINE void mbar_put(Ctx& ctx, u32 a, const MBar& b) {
  u64 x = (u64)b.expected | ((u64)b.pending << 16) | ((u64)((u32)b.tx & 0x7fffffffu) << 32) | ((u64)b.phase << 63);
  memcpy(ctx.cta->shared.data() + a, &x, 8);
}
// Arrivals and transferred bytes; the phase ends when none of either is missing. A waiter will have happened after this warp.
static void mbar_step(Ctx& ctx, u32 a, u32 arrivals, s32 tx) {
  MBar b = mbar_get(ctx, a);
  b.tx += tx;
  b.pending -= arrivals;
  if (b.pending == 0 && b.tx == 0) {
    b.phase ^= 1;
    b.pending = b.expected;
  }
  mbar_put(ctx, a, b);
  if (!ctx.launch->config.check_race) return;
  Shadow& s = ctx.cta->shadow;
  int me = ctx.warp->id;
  auto& clock = s.mbar_clock[a];
  if (clock.empty()) clock.assign(s.warps, 0);
  join_clocks(clock.data(), &s.clock[me * s.warps], s.warps);
  s.clock[me * s.warps + me]++;
}
enum { MB_INIT, MB_ARRIVE, MB_EXPECT, MB_ARRIVE_EXPECT, MB_WAIT };
// mode: MB_*, list: address, slot[2]: count, bytes or parity; pred0: whether the phase is over
static void h_mbar(Ctx& ctx, const Ins& ins) {
  const u32* value = lanes<u32>(ctx, ins.slot[2]);
  const Config& config = ctx.launch->config;
  Shadow& shadow = ctx.cta->shadow;
  u32 done = 0;
  EACH_ACTIVE(i, ctx.mask) {
    u32 a = shared_address(ctx, ins, operand_address(ctx, &ctx.prog->lists[ins.list], i), 8, i, 8);
    MBar b = mbar_get(ctx, a);
    switch (ins.mode) {
      case MB_INIT:
        mbar_put(ctx, a, {value[i], value[i], 0, 0});
        if (config.check_init) memset(&shadow.init[a], 1, 8);
        if (config.check_race) shadow.mbar_clock[a].assign(shadow.warps, 0);
        break;
      case MB_ARRIVE:
        if (b.pending < value[i]) fail(ctx, ins, i, "mbarrier.arrive: more arrivals than expected");
        mbar_step(ctx, a, value[i], 0);
        break;
      case MB_EXPECT: mbar_step(ctx, a, 0, (s32)value[i]); break;
      case MB_ARRIVE_EXPECT: mbar_step(ctx, a, 1, (s32)value[i]); break;
      case MB_WAIT:
        if (b.phase == (value[i] & 1)) break;
        done |= 1u << i;
        if (config.check_race) {
          auto& clock = shadow.mbar_clock[a];
          if (!clock.empty()) join_clocks(&shadow.clock[ctx.warp->id * shadow.warps], clock.data(), shadow.warps);
        }
        break;
    }
  }
  if (ins.mode != MB_WAIT) return;
  put_predicate(ctx, ins.pred0, done);
  if (done != ctx.mask) ctx.yield = true;  // the kernel spins; only another warp can end that
}

// ---------------------------------------------------------------- tensor maps
// 128 bytes in a layout of our own; for host-made descriptors the driver packs it (_tensor_map in driver.py), for others
// tensormap.replace fills it. Dimension 0 is the contiguous one; strides are in bytes, from dimension 1 on.
struct TensorMap {
  u64 base;
  u32 last_dim;  // rank - 1
  u32 box[5], dim[5];
  u32 unused;
  u64 stride[4];
  u32 elem_stride[5];
  u32 elem, swizzle, interleave, fill_nan, magic;
};
static_assert(sizeof(TensorMap) == 128, "TensorMap");
enum { TM_S32 = 3, TM_U64 = 4, TM_S64 = 5, TM_F16 = 6, TM_F32 = 7, TM_F32_FTZ = 8, TM_F64 = 9, TM_BF16 = 10, TM_LAST = 12 };
static const u32 TM_ELEM_SIZE[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};

static const u8* tensor_map_at(Ctx& ctx, const Ins& ins, u64 a, int lane) {
  if (!in_window(a, PARAM_BASE)) {
    if (!find_alloc(ctx, a, 128)) fail_out_of_bounds(ctx, ins, lane, a, 128, "tensor map read");
    return (const u8*)a;
  }
  a -= PARAM_BASE;
  if (a + 128 > ctx.launch->params.size()) fail(ctx, ins, lane, "tensor map outside the parameters");
  return ctx.launch->params.data() + a;
}

static u64 tma_reduce(u32 elem, int op, u64 old, u64 b) {
  switch (elem) {
    case TM_F32: case TM_F32_FTZ: return as_bits(atomic_float(op, as_float((u32)old), as_float((u32)b)));
    case TM_F16: return atomic_f16(op, (u16)old, (u16)b);
    case TM_BF16: return atomic_bf16(op, (u16)old, (u16)b);
    case TM_F64: return bit_cast<u64>(atomic_float(op, bit_cast<double>(old), bit_cast<double>(b)));
    case TM_S32: return (u32)atomic_int<s32>(op, (s32)old, (s32)b, 0);
    case TM_S64: return (u64)atomic_int<s64>(op, (s64)old, (s64)b, 0);
    case TM_U64: return atomic_int<u64>(op, old, b, 0);
    default: return atomic_int<u32>(op, (u32)old, (u32)b, 0);
  }
}

enum { TMA_LOAD, TMA_STORE, TMA_REDUCE };  // Ins::mode; reductions are TMA_REDUCE + AtomicOp
// One thread's copy of a box between global and shared memory.
struct BoxCopy {
  Ctx& ctx;
  const Ins& ins;
  int lane;
  TensorMap map;
  u32 elem_size, swizzle, shared_start, rows, row_bytes;
  s64 corner[5] = {0, 0, 0, 0, 0};
  u64 moved = 0, sectors = 0;

  BoxCopy(Ctx& c, const Ins& i, int l) : ctx(c), ins(i), lane(l) {
    const u32* operands = &ctx.prog->lists[ins.list];
    memcpy(&map, tensor_map_at(ctx, ins, operand_address(ctx, operands + 3, lane), lane), sizeof map);
    int rank = ins.count;
    if ((int)map.last_dim + 1 != rank || map.elem > TM_LAST)
      fail(ctx, ins, lane,
           fmt("tensor map has rank %u / element type %u, the instruction %d dimensions (uninitialised map?)", map.last_dim + 1,
               map.elem, rank));
    elem_size = TM_ELEM_SIZE[map.elem];
    rows = 1;
    for (int d = 0; d < rank; d++) {
      corner[d] = (s32)lanes<u32>(ctx, ctx.prog->lists[ins.list2 + d])[lane];
      if (d) rows *= map.box[d];
    }
    row_bytes = map.box[0] * elem_size;
    swizzle = map.swizzle && map.swizzle < 4 ? 4 - map.swizzle : 0;  // descriptors of wgmma count the other way round
    shared_start = shared_address(ctx, ins, operand_address(ctx, operands, lane), rows * row_bytes, lane, swizzle ? 128 : 16);
    if (map.base & 15) fail(ctx, ins, lane, "tensor map base is not 16-byte aligned");
    for (int d = 1; d < rank; d++)
      if (map.stride[d - 1] & 15)
        fail(ctx, ins, lane, fmt("tensor map stride %llu is not a multiple of 16 bytes", (ull)map.stride[d - 1]));
  }
  bool loads() const { return ins.mode == TMA_LOAD; }

  // Global memory of a row's elements that lie inside the tensor, which start at element `first` of the row.
  u8* inside(u32 row, u32* first, u32* bytes) {
    bool in = true;
    u64 address = map.base;
    for (int d = 1; d < ins.count; d++) {
      s64 x = corner[d] + (s64)(row % map.box[d]);
      row /= map.box[d];
      if (x < 0 || x >= (s64)map.dim[d]) in = false;
      else address += (u64)x * map.stride[d - 1];
    }
    s64 width = map.box[0], begin = width, end = width;
    if (in) {
      begin = std::min<s64>(std::max<s64>(0, -corner[0]), width);
      end = std::max<s64>(begin, std::min<s64>(width, (s64)map.dim[0] - corner[0]));
    }
    *first = (u32)begin;
    *bytes = (u32)((end - begin) * elem_size);
    return (u8*)(address + (u64)((corner[0] + begin) * (s64)elem_size));
  }

  void check_and_count(u64 a, u32 n) {
    const Alloc* alloc = ctx.last;
    if (!alloc || a < alloc->lo || a + n > alloc->hi) {
      alloc = find_alloc(ctx, a, n);
      if (!alloc) fail_out_of_bounds(ctx, ins, lane, a, (int)n, loads() ? "TMA load" : "TMA store");
    }
    ctx.last = alloc;
    moved += n;
    if (!ctx.launch->config.stats) return;
    for (u64 sector = a >> 5; sector <= (a + n - 1) >> 5; sector++) {
      sectors++;
      mark_sector(alloc, sector, loads(), !loads());
    }
  }

  void fill(u8* line) {
    if (!map.fill_nan || (map.elem != TM_F16 && map.elem != TM_F32 && map.elem != TM_BF16)) {
      memset(line, 0, row_bytes);
      return;
    }
    u32 nan = map.elem == TM_F32 ? 0x7fffffffu : 0x7fff;
    for (u32 e = 0; e < row_bytes; e += elem_size) memcpy(line + e, &nan, elem_size);
  }

  // Swizzling keeps 16-byte blocks together, so a row goes block by block.
  void move_shared(u32 row, u8* line) {
    u8* shared = ctx.cta->shared.data();
    u32 start = shared_start + row * row_bytes;
    for (u32 b = 0; b < row_bytes;) {
      u32 n = std::min(row_bytes - b, 16 - ((start + b) & 15)), a = swizzled(start + b, swizzle);
      if (a + n > ctx.cta->shared.size()) fail(ctx, ins, lane, "TMA box outside shared memory");
      if (loads()) {
        if (ctx.shadowed()) check_shared_write(ctx, ins, lane, a, (int)n, line + b);
        memcpy(shared + a, line + b, n);
      } else {
        if (ctx.shadowed()) check_shared_read(ctx, ins, lane, a, (int)n);
        memcpy(line + b, shared + a, n);
      }
      b += n;
    }
  }

  void reduce(u8* global, const u8* line, u32 bytes) {
    for (u32 e = 0; e < bytes; e += elem_size) {
      u64 old = 0, b = 0;
      memcpy(&old, global + e, elem_size);
      memcpy(&b, line + e, elem_size);
      u64 value = tma_reduce(map.elem, ins.mode - TMA_REDUCE, old, b);
      memcpy(global + e, &value, elem_size);
    }
  }

  void run() {
    u8 line[4096];
    if (row_bytes > sizeof line) fail(ctx, ins, lane, "TMA box too wide");
    for (u32 row = 0; row < rows; row++) {
      u32 first, bytes;
      u8* global = inside(row, &first, &bytes);
      u8* part = line + first * elem_size;
      if (bytes) check_and_count((u64)global, bytes);
      if (loads()) {
        fill(line);
        memcpy(part, global, bytes);
      }
      move_shared(row, line);
      if (ins.mode == TMA_STORE) memcpy(global, part, bytes);
      else if (!loads()) reduce(global, part, bytes);
    }
    if (!ctx.launch->config.stats) return;
    ctx.stat->bytes += moved;
    ctx.stat->sectors += sectors;
    ctx.stat->ideal += std::min<u64>(sectors, (moved + 31) / 32);
  }
};
// mode: TMA_*; list: addresses of the box in shared memory, the tensor map, the mbarrier of a load; list2: count coordinates.
// The work is done at issue; a load reports its bytes to the mbarrier.
static void h_tma(Ctx& ctx, const Ins& ins) {
  EACH_ACTIVE(i, ctx.mask) {
    BoxCopy copy(ctx, ins, i);
    copy.run();
    if (!copy.loads()) continue;
    u32 mbar = shared_address(ctx, ins, operand_address(ctx, &ctx.prog->lists[ins.list + 6], i), 8, i, 8);
    mbar_step(ctx, mbar, 0, -(s32)(copy.rows * copy.row_bytes));
  }
}

static const char* const TENSORMAP_FIELDS[] = {
    "global_address", "rank",     "box_dim",      "global_dim",        "global_stride",
    "element_stride", "elemtype", "swizzle_mode", "interleave_layout", "fill_mode"};
// mode: index of TENSORMAP_FIELDS, imm: ordinal, list: address, slot[2]: value of reg_size bytes
static void h_tensormap_replace(Ctx& ctx, const Ins& ins) {
  EACH_ACTIVE(i, ctx.mask) {
    u64 a = operand_address(ctx, &ctx.prog->lists[ins.list], i);
    bool global = a < PARAM_BASE && find_alloc(ctx, a, 128);
    u8* p = global ? (u8*)a : ctx.cta->shared.data() + shared_address(ctx, ins, a, 128, i, 64);
    TensorMap map;
    memcpy(&map, p, sizeof map);
    u64 x = ins.reg_size == 8 ? lanes<u64>(ctx, ins.slot[2])[i] : lanes<u32>(ctx, ins.slot[2])[i];
    switch (ins.mode) {
      case 0: map.base = x; break;
      case 1: map.last_dim = (u32)x; break;
      case 2: map.box[ins.imm] = (u32)x; break;
      case 3: map.dim[ins.imm] = (u32)x; break;
      case 4: map.stride[ins.imm] = x; break;
      case 5: map.elem_stride[ins.imm] = (u32)x; break;
      case 6: map.elem = (u32)x; break;
      case 7: map.swizzle = (u32)x; break;
      case 8: map.interleave = (u32)x; break;
      case 9: map.fill_nan = (u32)x; break;
    }
    memcpy(p, &map, sizeof map);
  }
}
// list: addresses of a tensor map in global memory and of one in shared memory, which is copied there
static void h_tensormap_copy(Ctx& ctx, const Ins& ins) {
  int lane = __builtin_ctz(ctx.mask);
  const u32* operands = &ctx.prog->lists[ins.list];
  u64 global = operand_address(ctx, operands, lane);
  u32 shared = shared_address(ctx, ins, operand_address(ctx, operands + 3, lane), 128, lane, 64);
  if (!find_alloc(ctx, global, 128)) fail_out_of_bounds(ctx, ins, lane, global, 128, "tensor map store");
  memcpy((void*)global, ctx.cta->shared.data() + shared, 128);
}
