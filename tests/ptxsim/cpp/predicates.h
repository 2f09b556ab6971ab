// Comparisons, predicate logic, selection; packing and unpacking of registers.
#pragma once
#include "alu_float.h"

enum Cmp { CE, CNE, CLT, CLE, CGT, CGE, CEU, CNEU, CLTU, CLEU, CGTU, CGEU, CNUM, CNAN };
static const std::map<std::string, int> COMPARISONS = {
    {"eq", CE},    {"ne", CNE},   {"lt", CLT},   {"le", CLE},   {"gt", CGT},   {"ge", CGE},
    {"lo", CLT},   {"ls", CLE},   {"hi", CGT},   {"hs", CGE},  // unsigned integers
    {"equ", CEU},  {"neu", CNEU}, {"ltu", CLTU}, {"leu", CLEU}, {"gtu", CGTU}, {"geu", CGEU},
    {"num", CNUM}, {"nan", CNAN}};

template <class T, int C> INLINE bool compare(T a, T b) {
  switch (C) {
    case CE: return a == b;
    case CNE: return a != b && a == a && b == b;
    case CLT: return a < b;
    case CLE: return a <= b;
    case CGT: return a > b;
    case CGE: return a >= b;
    case CEU: return !(a != b) || a != a || b != b;
    case CNEU: return a != b;
    case CLTU: return !(a >= b);
    case CLEU: return !(a > b);
    case CGTU: return !(a <= b);
    case CGEU: return !(a < b);
    case CNUM: return a == a && b == b;
    default: return a != a || b != b;
  }
}

// pred0 and, where given, pred1 take the comparison and its opposite, each combined with pred2: mode2 1 and, 2 or, 3 xor;
// flag: pred2 is negated.
INLINE void set_predicates(Ctx& ctx, const Ins& ins, u32 r) {
  u32 opposite = ~r;
  if (ins.pred2 >= 0) {
    u32 with = ctx.preds[ins.pred2] ^ (ins.flag ? FULL : 0);
    switch (ins.mode2) {
      case 1: r &= with, opposite &= with; break;
      case 2: r |= with, opposite |= with; break;
      default: r ^= with, opposite ^= with;
    }
  }
  put_predicate(ctx, ins.pred0, r);
  if (ins.pred1 >= 0) put_predicate(ctx, ins.pred1, opposite);
}
template <class T, int C> static void h_setp(Ctx& ctx, const Ins& ins) {
  T *a = lanes<T>(ctx, ins.slot[0]), *b = lanes<T>(ctx, ins.slot[1]);
  u32 r = 0;
  EACH_LANE(i) r |= (u32)compare<T, C>(a[i], b[i]) << i;
  set_predicates(ctx, ins, r);
}
template <int H, int C> static void h_setp16(Ctx& ctx, const Ins& ins) {
  u16 *a = lanes<u16>(ctx, ins.slot[0]), *b = lanes<u16>(ctx, ins.slot[1]);
  u32 r = 0;
  EACH_LANE(i) r |= (u32)compare<float, C>(half_to_float<H>(a[i]), half_to_float<H>(b[i])) << i;
  set_predicates(ctx, ins, r);
}
template <int C> static Handler setp_handler_of(Type t) {
  switch (t) {
    case T_B16: case T_U16: return h_setp<u16, C>;
    case T_S16: return h_setp<s16, C>;
    case T_B32: case T_U32: return h_setp<u32, C>;
    case T_S32: return h_setp<s32, C>;
    case T_B64: case T_U64: return h_setp<u64, C>;
    case T_S64: return h_setp<s64, C>;
    case T_F32: return h_setp<float, C>;
    case T_F64: return h_setp<double, C>;
    case T_F16: return h_setp16<0, C>;
    case T_BF16: return h_setp16<1, C>;
    default: return nullptr;
  }
}
static Handler setp_handler(int comparison, Type t) {
#define SETP_CASE(c) \
  case c: return setp_handler_of<c>(t);
  switch (comparison) {
    SETP_CASE(CE)
    SETP_CASE(CNE)
    SETP_CASE(CLT)
    SETP_CASE(CLE)
    SETP_CASE(CGT)
    SETP_CASE(CGE)
    SETP_CASE(CEU)
    SETP_CASE(CNEU)
    SETP_CASE(CLTU)
    SETP_CASE(CLEU)
    SETP_CASE(CGTU)
    SETP_CASE(CGEU)
    SETP_CASE(CNUM)
    SETP_CASE(CNAN)
  }
  return nullptr;
}

// set.cmp.dst.src: all ones, or 1.0. mode: Cmp; slot[4], slot[5]: the types of result and operands. Rare, so it is not worth
// a handler per type; 32-bit integers are exact in double.
static bool compare_double(int comparison, double a, double b) {
  bool unordered = a != a || b != b;
  switch (comparison) {
    case CE: return a == b;
    case CNE: return !unordered && a != b;
    case CLT: return a < b;
    case CLE: return a <= b;
    case CGT: return a > b;
    case CGE: return a >= b;
    case CEU: return unordered || a == b;
    case CNEU: return a != b;
    case CLTU: return unordered || a < b;
    case CLEU: return unordered || a <= b;
    case CGTU: return unordered || a > b;
    case CGEU: return unordered || a >= b;
    case CNUM: return !unordered;
    default: return unordered;
  }
}
static void h_set(Ctx& ctx, const Ins& ins) {
  Type dst = (Type)ins.slot[4], src = (Type)ins.slot[5];
  u32 d = ins.slot[0];
  bool packed = src == T_F16X2 || src == T_BF16X2;
  auto half = [&](u16 x) { return src == T_F16 || src == T_F16X2 ? f16_to_f32(x) : bf16_to_f32(x); };
  auto operand = [&](u32 slot, int i, int high) -> double {
    switch (src) {
      case T_F32: return lanes<float>(ctx, slot)[i];
      case T_F64: return lanes<double>(ctx, slot)[i];
      case T_F16: case T_BF16: return half(lanes<u16>(ctx, slot)[i]);
      case T_S32: return lanes<s32>(ctx, slot)[i];
      case T_U32: case T_B32: return lanes<u32>(ctx, slot)[i];
      default: return half((u16)(lanes<u32>(ctx, slot)[i] >> (16 * high)));
    }
  };
  EACH_ACTIVE(i, ctx.mask) {
    bool lo = compare_double(ins.mode, operand(ins.slot[1], i, 0), operand(ins.slot[2], i, 0));
    bool hi = packed && compare_double(ins.mode, operand(ins.slot[1], i, 1), operand(ins.slot[2], i, 1));
    switch (dst) {
      case T_F32: lanes<float>(ctx, d)[i] = lo ? 1.f : 0.f; break;
      case T_F16: lanes<u16>(ctx, d)[i] = lo ? 0x3c00 : 0; break;
      case T_BF16: lanes<u16>(ctx, d)[i] = lo ? 0x3f80 : 0; break;
      case T_F16X2: lanes<u32>(ctx, d)[i] = (lo ? 0x3c00u : 0) | (hi ? 0x3c000000u : 0); break;
      case T_BF16X2: lanes<u32>(ctx, d)[i] = (lo ? 0x3f80u : 0) | (hi ? 0x3f800000u : 0); break;
      case T_U16: case T_S16: lanes<u16>(ctx, d)[i] = lo ? 0xffff : 0; break;
      default: lanes<u32>(ctx, d)[i] = packed ? (lo ? 0xffffu : 0) | (hi ? 0xffff0000u : 0) : (lo ? FULL : 0);
    }
  }
}

// mode: 0 and, 1 or, 2 xor, 3 not, 4 mov; flag bits 0, 1: pred1, pred2 are negated
static void h_predicate_logic(Ctx& ctx, const Ins& ins) {
  u32 a = ctx.preds[ins.pred1] ^ ((ins.flag & 1) ? FULL : 0), r;
  u32 b = ins.pred2 >= 0 ? ctx.preds[ins.pred2] ^ ((ins.flag & 2) ? FULL : 0) : 0;
  switch (ins.mode) {
    case 0: r = a & b; break;
    case 1: r = a | b; break;
    case 2: r = a ^ b; break;
    case 3: r = ~a; break;
    default: r = a;
  }
  put_predicate(ctx, ins.pred0, r);
}

// flag: pred0 is negated
template <class T> static void h_selp(Ctx& ctx, const Ins& ins) {
  T *d = lanes<T>(ctx, ins.slot[0]), *a = lanes<T>(ctx, ins.slot[1]), *b = lanes<T>(ctx, ins.slot[2]);
  u32 p = ctx.preds[ins.pred0] ^ (ins.flag ? FULL : 0), m = ctx.mask;
  IVDEP EACH_LANE(i) {
    T r = on(p, i) ? a[i] : b[i];
    d[i] = on(m, i) ? r : d[i];
  }
}

static const char* const TESTP_NAMES[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
// mode: index of TESTP_NAMES
static void h_testp(Ctx& ctx, const Ins& ins) {
  u32 r = 0;
  EACH_LANE(i) {
    bool single = ins.reg_size == 4;
    int kind = single ? std::fpclassify(lanes<float>(ctx, ins.slot[0])[i])
                      : std::fpclassify(lanes<double>(ctx, ins.slot[0])[i]);
    bool is;
    switch (ins.mode) {
      case 0: is = kind != FP_NAN && kind != FP_INFINITE; break;
      case 1: is = kind == FP_INFINITE; break;
      case 2: is = kind != FP_NAN; break;
      case 3: is = kind == FP_NAN; break;
      case 4: is = kind == FP_NORMAL; break;
      default: is = kind == FP_SUBNORMAL;
    }
    r |= (u32)is << i;
  }
  put_predicate(ctx, ins.pred0, r);
}

// ---------------------------------------------------------------- mov {a, b}, c and back
// list: the parts, lowest first. Copies keep an operand that is also a destination.
template <class Wide, class Part> static void h_unpack(Ctx& ctx, const Ins& ins) {
  const u32* parts = &ctx.prog->lists[ins.list];
  u32 m = ctx.mask;
  Wide wide[32];
  memcpy(wide, lanes<Wide>(ctx, ins.slot[0]), sizeof wide);
  for (int k = 0; k < ins.count; k++) {
    if (parts[k] == NO_SLOT) continue;
    Part* d = lanes<Part>(ctx, parts[k]);
    int shift = k * sizeof(Part) * 8;
    if (m == FULL) {
      IVDEP EACH_LANE(i) d[i] = (Part)(wide[i] >> shift);
    } else {
      EACH_ACTIVE(i, m) d[i] = (Part)(wide[i] >> shift);
    }
  }
}
template <class Wide, class Part> static void h_pack(Ctx& ctx, const Ins& ins) {
  Wide* d = lanes<Wide>(ctx, ins.slot[0]);
  const u32* parts = &ctx.prog->lists[ins.list];
  u32 m = ctx.mask;
  Wide wide[32];
  Part* first = lanes<Part>(ctx, parts[0]);
  EACH_LANE(i) wide[i] = (Wide)first[i];
  for (int k = 1; k < ins.count; k++) {
    Part* a = lanes<Part>(ctx, parts[k]);
    int shift = k * sizeof(Part) * 8;
    EACH_LANE(i) wide[i] |= (Wide)a[i] << shift;
  }
  if (m == FULL) {
    IVDEP EACH_LANE(i) d[i] = wide[i];
  } else {
    EACH_ACTIVE(i, m) d[i] = wide[i];
  }
}
// Bytes live in 16-bit registers.
template <class Wide> static void h_unpack8(Ctx& ctx, const Ins& ins) {
  const u32* parts = &ctx.prog->lists[ins.list];
  Wide wide[32];
  memcpy(wide, lanes<Wide>(ctx, ins.slot[0]), sizeof wide);
  for (int k = 0; k < ins.count; k++) {
    if (parts[k] == NO_SLOT) continue;
    u16* d = lanes<u16>(ctx, parts[k]);
    EACH_ACTIVE(i, ctx.mask) d[i] = (u8)(wide[i] >> (8 * k));
  }
}
template <class Wide> static void h_pack8(Ctx& ctx, const Ins& ins) {
  Wide* d = lanes<Wide>(ctx, ins.slot[0]);
  const u32* parts = &ctx.prog->lists[ins.list];
  Wide wide[32] = {};
  for (int k = 0; k < ins.count; k++) {
    u16* a = lanes<u16>(ctx, parts[k]);
    EACH_LANE(i) wide[i] |= (Wide)(u8)a[i] << (8 * k);
  }
  EACH_ACTIVE(i, ctx.mask) d[i] = wide[i];
}

static void h_clock(Ctx& ctx, const Ins& ins) {
  EACH_ACTIVE(i, ctx.mask) {
    if (ins.reg_size == 8) lanes<u64>(ctx, ins.slot[0])[i] = ctx.clock;
    else lanes<u32>(ctx, ins.slot[0])[i] = (u32)ctx.clock;
  }
}
