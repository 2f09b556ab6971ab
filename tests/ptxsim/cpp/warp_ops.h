// Instructions that look across the lanes of a warp, and the calls into the runtime: assert and printf.
#pragma once
#include "alu_float.h"
#include "memory.h"

// ---------------------------------------------------------------- shuffles
enum Shuffle { SHFL_UP, SHFL_DOWN, SHFL_BFLY, SHFL_IDX };
// Lane that `lane` reads from; itself, and false, where the source is outside its segment. `c` has the clamp value in bits
// 0-4, the segment mask in bits 8-12.
INLINE bool shuffle_source(int mode, int lane, u32 b_value, u32 c, int* source) {
  int b = b_value & 31, clamp = c & 31, segment = (c >> 8) & 31, last = (lane & segment) | (clamp & ~segment), j;
  switch (mode) {
    case SHFL_UP: j = lane - b; break;
    case SHFL_DOWN: j = lane + b; break;
    case SHFL_BFLY: j = lane ^ b; break;
    default: j = (lane & segment) | (b & ~segment & 31);
  }
  bool inside = mode == SHFL_UP ? j >= last : j <= last;
  *source = inside ? j : lane;
  return inside;
}

// slot[1]: value, slot[2]: b, slot[3]: c; pred0, where given: whether the source was inside the segment
static void h_shfl(Ctx& ctx, const Ins& ins) {
  u32* d = lanes<u32>(ctx, ins.slot[0]);
  u32 *b = lanes<u32>(ctx, ins.slot[2]), *c = lanes<u32>(ctx, ins.slot[3]);
  u32 value[32], m = ctx.mask, inside = 0;
  memcpy(value, lanes<u32>(ctx, ins.slot[1]), sizeof value);
  EACH_ACTIVE(i, m) {
    int source;
    inside |= (u32)shuffle_source(ins.mode, i, b[i], c[i], &source) << i;
    if (!on(m, source))
      fail(ctx, ins, i, fmt("shfl.sync reads lane %d, which does not take part (mask 0x%08x)", source, m));
    d[i] = value[source];
  }
  if (ins.pred0 >= 0) put_predicate(ctx, ins.pred0, inside);
}
// list: the source lanes, known from immediates
static void h_shfl_table(Ctx& ctx, const Ins& ins) {
  if (ctx.mask != FULL) return h_shfl(ctx, ins);
  const u32* source = &ctx.prog->lists[ins.list];
  u32* d = lanes<u32>(ctx, ins.slot[0]);
  u32 value[32];
  memcpy(value, lanes<u32>(ctx, ins.slot[1]), sizeof value);
  EACH_LANE(i) d[i] = value[source[i]];
}

// ---------------------------------------------------------------- votes
enum Vote { VOTE_ANY, VOTE_ALL, VOTE_UNI, VOTE_BALLOT };
// flag: pred1 is negated
static void h_vote(Ctx& ctx, const Ins& ins) {
  u32 m = ctx.mask, p = (ctx.preds[ins.pred1] ^ (ins.flag ? FULL : 0)) & m;
  if (ins.mode == VOTE_BALLOT) {
    u32* d = lanes<u32>(ctx, ins.slot[0]);
    EACH_ACTIVE(i, m) d[i] = p;
    return;
  }
  bool r = ins.mode == VOTE_ANY ? p != 0 : ins.mode == VOTE_ALL ? p == m : (p == m || p == 0);
  put_predicate(ctx, ins.pred0, r ? FULL : 0);
}
static void h_activemask(Ctx& ctx, const Ins& ins) {
  u32* d = lanes<u32>(ctx, ins.slot[0]);
  EACH_ACTIVE(i, ctx.mask) d[i] = ctx.mask;
}
// mode: 0 any, 1 all
static void h_match(Ctx& ctx, const Ins& ins) {
  u32 m = ctx.mask, equal[32] = {}, all = 0;
  auto value = [&](int i) -> u64 {
    return ins.reg_size == 4 ? lanes<u32>(ctx, ins.slot[1])[i] : lanes<u64>(ctx, ins.slot[1])[i];
  };
  EACH_ACTIVE(i, m) {
    EACH_ACTIVE(j, m) equal[i] |= (u32)(value(i) == value(j)) << j;
  }
  u32* d = lanes<u32>(ctx, ins.slot[0]);
  EACH_ACTIVE(i, m) {
    bool same = equal[i] == m;
    d[i] = ins.mode == 0 ? equal[i] : same ? m : 0;
    if (ins.mode) all |= (u32)same << i;
  }
  if (ins.pred0 >= 0) put_predicate(ctx, ins.pred0, all);
}
// mode: AtomicOp, mode2: type, flag: NaN
static void h_redux(Ctx& ctx, const Ins& ins) {
  u32 m = ctx.mask, *a = lanes<u32>(ctx, ins.slot[1]), *d = lanes<u32>(ctx, ins.slot[0]);
  Type t = (Type)ins.mode2;
  auto combine = [&](u32 x, u32 y) -> u32 {
    if (t == T_S32) return (u32)atomic_int<s32>(ins.mode, (s32)x, (s32)y, 0);
    if (t != T_F32) return atomic_int<u32>(ins.mode, x, y, 0);
    float f = as_float(x), g = as_float(y);
    if (ins.mode == A_MIN) return as_bits(ins.flag ? min_nan(f, g) : min_number(f, g));
    return as_bits(ins.flag ? max_nan(f, g) : max_number(f, g));
  };
  int first = __builtin_ctz(m);
  u32 r = a[first];
  EACH_ACTIVE(i, m & (m - 1)) r = combine(r, a[i]);
  EACH_ACTIVE(i, m) d[i] = r;
}
static void h_elect(Ctx& ctx, const Ins& ins) {
  int leader = __builtin_ctz(ctx.mask);
  if (ins.slot[0] != NO_SLOT) {
    u32* d = lanes<u32>(ctx, ins.slot[0]);
    EACH_ACTIVE(i, ctx.mask) d[i] = leader;
  }
  put_predicate(ctx, ins.pred0, 1u << leader);
}

// ---------------------------------------------------------------- nothing, errors
static void h_nop(Ctx&, const Ins&) {}
static void h_unsupported(Ctx& ctx, const Ins& ins) {
  fail(ctx, ins, -1, ins.text >= 0 ? ctx.prog->messages[ins.text] : "unsupported instruction");
}
static void h_trap(Ctx& ctx, const Ins& ins) { fail(ctx, ins, __builtin_ctz(ctx.mask), "trap executed"); }

// ---------------------------------------------------------------- assert and printf
// list: where in local memory the call's arguments are: message, file, line, function
static void h_assert(Ctx& ctx, const Ins& ins) {
  int lane = __builtin_ctz(ctx.mask);
  const u32* arguments = &ctx.prog->lists[ins.list];
  auto argument = [&](int k, int n) {
    u64 x = 0;
    memcpy(&x, ctx.warp->local + (size_t)lane * ctx.prog->local_bytes + arguments[k], n);
    return x;
  };
  auto text = [&](int k) {
    u64 a = argument(k, 8);
    return find_alloc(ctx, a, 1) ? std::string((const char*)a) : std::string("?");
  };
  fail(ctx, ins, lane,
       fmt("device_assert failed: \"%s\" at %s:%u in %s", text(0).c_str(), text(1).c_str(), (u32)argument(2, 4),
           text(3).c_str()));
}

// One line of vprintf: the arguments lie behind each other, each aligned to its size.
static std::string format_arguments(const char* format, const u8* arguments) {
  std::string out;
  size_t offset = 0;
  auto take = [&](auto x) {
    offset = (offset + sizeof x - 1) & ~(sizeof x - 1);
    memcpy(&x, arguments + offset, sizeof x);
    offset += sizeof x;
    return x;
  };
  for (const char* s = format; *s;) {
    if (*s != '%') {
      out += *s++;
      continue;
    }
    if (s[1] == '%') {
      out += '%';
      s += 2;
      continue;
    }
    std::string spec(1, *s++);
    bool is_long = false;
    while (*s && !strchr("diuoxXfFeEgGcsp", *s)) {
      if (*s == 'l') is_long = true;
      spec += *s++;
    }
    char conversion = *s;
    if (*s) spec += *s++;
    char b[256];
    if (strchr("fFeEgG", conversion)) snprintf(b, sizeof b, spec.c_str(), take(double()));
    else if (conversion == 's') snprintf(b, sizeof b, spec.c_str(), (const char*)take(u64()));
    else if (conversion == 'p' || is_long) snprintf(b, sizeof b, spec.c_str(), take(u64()));
    else snprintf(b, sizeof b, spec.c_str(), take(u32()));
    out += b;
  }
  return out;
}
// list: where in local memory the call's arguments are: format, pointer to the values
static void h_vprintf(Ctx& ctx, const Ins& ins) {
  const u32* arguments = &ctx.prog->lists[ins.list];
  EACH_ACTIVE(i, ctx.mask) {
    u8* local = ctx.warp->local + (size_t)i * ctx.prog->local_bytes;
    u64 format, values;
    memcpy(&format, local + arguments[0], 8);
    memcpy(&values, local + arguments[1], 8);
    if (values >= LOCAL_BASE) values -= LOCAL_BASE;
    fputs(format_arguments((const char*)format, local + values).c_str(), stdout);
  }
  fflush(stdout);
}
