// Elementwise handlers, and integer arithmetic.
#pragma once
#include "state.h"

// ---------------------------------------------------------------- elementwise handlers
// An operation is a struct with the types of its result D and operands A, B, C and a static f. Writing to inactive lanes what
// they hold already lets the compiler vectorise the masked loop.
template <class F> static void map1(Ctx& ctx, const Ins& ins) {
  auto* d = lanes<typename F::D>(ctx, ins.slot[0]);
  auto* a = lanes<typename F::A>(ctx, ins.slot[1]);
  u32 m = ctx.mask;
  if (m == FULL) {
    IVDEP EACH_LANE(i) d[i] = F::f(a[i]);
  } else {
    IVDEP EACH_LANE(i) d[i] = on(m, i) ? F::f(a[i]) : d[i];
  }
}
template <class F> static void map2(Ctx& ctx, const Ins& ins) {
  auto* d = lanes<typename F::D>(ctx, ins.slot[0]);
  auto* a = lanes<typename F::A>(ctx, ins.slot[1]);
  auto* b = lanes<typename F::B>(ctx, ins.slot[2]);
  u32 m = ctx.mask;
  if (m == FULL) {
    IVDEP EACH_LANE(i) d[i] = F::f(a[i], b[i]);
  } else {
    IVDEP EACH_LANE(i) d[i] = on(m, i) ? F::f(a[i], b[i]) : d[i];
  }
}
template <class F> static void map3(Ctx& ctx, const Ins& ins) {
  auto* d = lanes<typename F::D>(ctx, ins.slot[0]);
  auto* a = lanes<typename F::A>(ctx, ins.slot[1]);
  auto* b = lanes<typename F::B>(ctx, ins.slot[2]);
  auto* c = lanes<typename F::C>(ctx, ins.slot[3]);
  u32 m = ctx.mask;
  if (m == FULL) {
    IVDEP EACH_LANE(i) d[i] = F::f(a[i], b[i], c[i]);
  } else {
    IVDEP EACH_LANE(i) d[i] = on(m, i) ? F::f(a[i], b[i], c[i]) : d[i];
  }
}

#define OP1(NAME, RESULT, OPERAND, EXPR) \
  struct NAME { \
    typedef RESULT D; \
    typedef OPERAND A; \
    INLINE D f(A a) { return EXPR; } \
  };
#define OP1_T(NAME, EXPR) \
  template <class T> struct NAME { \
    typedef T D, A; \
    INLINE T f(T a) { return EXPR; } \
  };
#define OP2_T(NAME, EXPR) \
  template <class T> struct NAME { \
    typedef T D, A, B; \
    INLINE T f(T a, T b) { return EXPR; } \
  };
template <class T> using Unsigned = typename std::make_unsigned<T>::type;

// ---------------------------------------------------------------- one result per lane
OP2_T(Add, (T)(a + b))
OP2_T(Sub, (T)(a - b))
OP2_T(And, (a & b))
OP2_T(Or, a | b)
OP2_T(Xor, a ^ b)
OP2_T(Min, a < b ? a : b)
OP2_T(Max, a > b ? a : b)
OP2_T(Mul, (a * b))
OP2_T(MulLo16, (T)((u32)a * (u32)b))
OP1_T(Not, ~a)
OP1_T(CNot, a == 0)
OP1_T(NegI, (T)(0 - (Unsigned<T>)a))
OP1_T(AbsI, a < 0 ? (T)(0 - (Unsigned<T>)a) : a)
OP1_T(Mov, a)

// C++ leaves division by zero and INT_MIN / -1 undefined; the host would raise a signal.
template <class T> struct DivI {
  typedef T D, A, B;
  INLINE T f(T a, T b) {
    if (b == 0) return (T)-1;
    if (std::is_signed<T>::value && b == (T)-1) return (T)(0 - (Unsigned<T>)a);
    return a / b;
  }
};
template <class T> struct RemI {
  typedef T D, A, B;
  INLINE T f(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed<T>::value && b == (T)-1) return 0;
    return a % b;
  }
};
template <class T> struct MulHi {
  typedef T D, A, B;
  INLINE T f(T a, T b) {
    if (sizeof(T) == 8)
      return std::is_signed<T>::value ? (T)(((s128)(s64)a * (s64)b) >> 64) : (T)(((u128)(u64)a * (u64)b) >> 64);
    const int bits = 8 * (sizeof(T) & 7);
    return std::is_signed<T>::value ? (T)(((s64)a * (s64)b) >> bits) : (T)(((u64)a * (u64)b) >> bits);
  }
};
template <class W, class T> struct MulWide {
  typedef W D;
  typedef T A, B;
  INLINE W f(T a, T b) { return (W)a * (W)b; }
};
template <class W, class T> struct MadWide {
  typedef W D, C;
  typedef T A, B;
  INLINE W f(T a, T b, W c) { return (W)((Unsigned<W>)((W)a * (W)b) + (Unsigned<W>)c); }
};
template <class T> struct MadLo {
  typedef T D, A, B, C;
  INLINE T f(T a, T b, T c) { return (T)(a * b + c); }
};
// Its own, since the product of two u16 is an int, which it may overflow.
struct MadLo16 {
  typedef u16 D, A, B, C;
  INLINE u16 f(u16 a, u16 b, u16 c) { return (u16)((u32)a * (u32)b + c); }
};
template <class T> struct MadHi {
  typedef T D, A, B, C;
  INLINE T f(T a, T b, T c) { return (T)((Unsigned<T>)MulHi<T>::f(a, b) + (Unsigned<T>)c); }
};
// PTX clamps shift amounts where C++ leaves them undefined.
template <class T> struct Shl {
  typedef T D, A;
  typedef u32 B;
  INLINE T f(T a, u32 b) { return b >= sizeof(T) * 8 ? 0 : (T)(a << b); }
};
template <class T> struct Shr {
  typedef T D, A;
  typedef u32 B;
  INLINE T f(T a, u32 b) {
    const u32 n = sizeof(T) * 8;
    if (std::is_signed<T>::value) return (T)(a >> (b >= n ? n - 1 : b));
    return b >= n ? 0 : (T)(a >> b);
  }
};

OP1(Popc32, u32, u32, (u32)__builtin_popcount(a))
OP1(Popc64, u32, u64, (u32)__builtin_popcountll(a))
OP1(Clz32, u32, u32, a ? (u32)__builtin_clz(a) : 32u)
OP1(Clz64, u32, u64, a ? (u32)__builtin_clzll(a) : 64u)
INLINE u32 reverse_bits(u32 x) {
  x = (x >> 16) | (x << 16);
  x = ((x >> 8) & 0x00ff00ffu) | ((x & 0x00ff00ffu) << 8);
  x = ((x >> 4) & 0x0f0f0f0fu) | ((x & 0x0f0f0f0fu) << 4);
  x = ((x >> 2) & 0x33333333u) | ((x & 0x33333333u) << 2);
  return ((x >> 1) & 0x55555555u) | ((x & 0x55555555u) << 1);
}
OP1(Brev32, u32, u32, reverse_bits(a))
OP1(Brev64, u64, u64, ((u64)reverse_bits((u32)a) << 32) | reverse_bits((u32)(a >> 32)))
OP1(BfindU32, u32, u32, a ? 31u - __builtin_clz(a) : ~0u)
OP1(BfindU64, u32, u64, a ? 63u - __builtin_clzll(a) : ~0u)
OP1(BfindS32, u32, s32, (a ^ (a >> 31)) ? 31u - __builtin_clz(a ^ (a >> 31)) : ~0u)
OP1(BfindS64, u32, s64, (a ^ (a >> 63)) ? 63u - __builtin_clzll(a ^ (a >> 63)) : ~0u)

// A signed field takes its sign from its own top bit, or from the operand's where the field reaches past it.
template <class T> struct Bfe {
  typedef T D, A;
  typedef u32 B, C;
  INLINE T f(T a, u32 b, u32 c) {
    typedef Unsigned<T> U;
    const u32 n = sizeof(T) * 8;
    u32 pos = b & 255, len = c & 255;
    U x = pos >= n ? 0 : (U)a >> pos;
    if (!std::is_signed<T>::value) return (T)(len < n ? x & (((U)1 << len) - 1) : x);
    if (len == 0) return 0;
    U sign = ((U)a >> (pos + len - 1 < n - 1 ? pos + len - 1 : n - 1)) & 1;
    if (pos >= n) x = sign ? ~(U)0 : 0;
    u32 available = pos >= n ? 0 : n - pos, l = len < available ? len : available;
    if (l < n) {
      x &= ((U)1 << l) - 1;
      if (sign) x |= ~(((U)1 << l) - 1);
    }
    return (T)x;
  }
};

template <class T> static void h_bfi(Ctx& ctx, const Ins& ins) {
  T *d = lanes<T>(ctx, ins.slot[0]), *a = lanes<T>(ctx, ins.slot[1]), *b = lanes<T>(ctx, ins.slot[2]);
  u32 *pos = lanes<u32>(ctx, ins.slot[3]), *len = lanes<u32>(ctx, ins.slot[4]);
  const u32 n = sizeof(T) * 8;
  EACH_ACTIVE(i, ctx.mask) {
    u32 p = pos[i] & 255, l = len[i] & 255;
    T field = l >= n ? ~(T)0 : (((T)1 << l) - 1);
    d[i] = p >= n ? b[i] : (b[i] & ~(field << p)) | ((a[i] << p) & (field << p));
  }
}

// mode: 0 general, 1 f4e, 2 b4e, 3 rc8, 4 ecl, 5 ecr, 6 rc16
static void h_prmt(Ctx& ctx, const Ins& ins) {
  u32 *d = lanes<u32>(ctx, ins.slot[0]), *a = lanes<u32>(ctx, ins.slot[1]);
  u32 *b = lanes<u32>(ctx, ins.slot[2]), *selector = lanes<u32>(ctx, ins.slot[3]);
  EACH_ACTIVE(i, ctx.mask) {
    u64 x = ((u64)b[i] << 32) | a[i];
    u32 r = 0, sel = selector[i], q = sel & 3;
    for (u32 k = 0; k < 4; k++) {
      u32 byte;
      bool sign = false;
      switch (ins.mode) {
        case 0:
          byte = (sel >> (4 * k)) & 7;
          sign = (sel >> (4 * k)) & 8;
          break;
        case 1: byte = (q + k) & 7; break;
        case 2: byte = (q - k) & 7; break;
        case 3: byte = q; break;
        case 4: byte = k > q ? k : q; break;
        case 5: byte = k < q ? k : q; break;
        default: byte = (q & 1) * 2 + (k & 1);
      }
      u32 v = (x >> (8 * byte)) & 255;
      if (sign) v = (v & 0x80) ? 255 : 0;
      r |= v << (8 * k);
    }
    d[i] = r;
  }
}

// imm: the truth table. Masks spread from its bits make one expression for all 256 tables, which vectorises.
static void h_lop3(Ctx& ctx, const Ins& ins) {
  u32 *d = lanes<u32>(ctx, ins.slot[0]), *a = lanes<u32>(ctx, ins.slot[1]);
  u32 *b = lanes<u32>(ctx, ins.slot[2]), *c = lanes<u32>(ctx, ins.slot[3]);
  u32 m = ctx.mask, k[8];
  for (int j = 0; j < 8; j++) k[j] = ((u32)ins.imm >> j) & 1 ? FULL : 0;
  IVDEP EACH_LANE(i) {
    u32 A = a[i], B = b[i], C = c[i];
    u32 r = (~A & ~B & ~C & k[0]) | (~A & ~B & C & k[1]) | (~A & B & ~C & k[2]) | (~A & B & C & k[3]) |
            (A & ~B & ~C & k[4]) | (A & ~B & C & k[5]) | (A & B & ~C & k[6]) | (A & B & C & k[7]);
    d[i] = on(m, i) ? r : d[i];
  }
}

// mode bit 0: right, bit 1: clamp instead of wrap
static void h_shf(Ctx& ctx, const Ins& ins) {
  u32 *d = lanes<u32>(ctx, ins.slot[0]), *a = lanes<u32>(ctx, ins.slot[1]);
  u32 *b = lanes<u32>(ctx, ins.slot[2]), *shift = lanes<u32>(ctx, ins.slot[3]);
  EACH_ACTIVE(i, ctx.mask) {
    u64 x = ((u64)b[i] << 32) | a[i];
    u32 n = (ins.mode & 2) ? (shift[i] > 32 ? 32 : shift[i]) : (shift[i] & 31);
    d[i] = (ins.mode & 1) ? (u32)(x >> n) : (u32)((x << n) >> 32);
  }
}

// mode, mode2: a, b are signed
static void h_dp4a(Ctx& ctx, const Ins& ins) {
  u32 *d = lanes<u32>(ctx, ins.slot[0]), *a = lanes<u32>(ctx, ins.slot[1]);
  u32 *b = lanes<u32>(ctx, ins.slot[2]), *c = lanes<u32>(ctx, ins.slot[3]);
  EACH_ACTIVE(i, ctx.mask) {
    u32 r = c[i];
    for (int k = 0; k < 4; k++) {
      s32 x = ins.mode ? (s32)(s8)(a[i] >> 8 * k) : (s32)(u8)(a[i] >> 8 * k);
      s32 y = ins.mode2 ? (s32)(s8)(b[i] >> 8 * k) : (s32)(u8)(b[i] >> 8 * k);
      r += (u32)(x * y);
    }
    d[i] = r;
  }
}

template <class T, class F> static void h_x2int(Ctx& ctx, const Ins& ins) {
  u32 *d = lanes<u32>(ctx, ins.slot[0]), *a = lanes<u32>(ctx, ins.slot[1]), *b = lanes<u32>(ctx, ins.slot[2]);
  EACH_ACTIVE(i, ctx.mask)
    d[i] = (u16)F::f((T)a[i], (T)b[i]) | ((u32)(u16)F::f((T)(a[i] >> 16), (T)(b[i] >> 16)) << 16);
}

// ---------------------------------------------------------------- carry chains
// flag bit 0: carry in, bit 1: carry out; the carry of each lane is a bit of the warp's condition code.
enum { CARRY_IN = 1, CARRY_OUT = 2 };
INLINE void set_carry(Ctx& ctx, const Ins& ins, int lane, u64 carry) {
  if (ins.flag & CARRY_OUT) ctx.warp->carry = (ctx.warp->carry & ~(1u << lane)) | ((u32)(carry & 1) << lane);
}

// mode: 0 add, 1 sub
static void h_addc(Ctx& ctx, const Ins& ins) {
  EACH_ACTIVE(i, ctx.mask) {
    u64 in = (ins.flag & CARRY_IN) ? on(ctx.warp->carry, i) : 0;
    if (ins.reg_size == 4) {
      u64 a = lanes<u32>(ctx, ins.slot[1])[i], b = lanes<u32>(ctx, ins.slot[2])[i];
      u64 r = ins.mode ? a - b - in : a + b + in;
      lanes<u32>(ctx, ins.slot[0])[i] = (u32)r;
      set_carry(ctx, ins, i, r >> 32);
    } else {
      u128 a = lanes<u64>(ctx, ins.slot[1])[i], b = lanes<u64>(ctx, ins.slot[2])[i];
      u128 r = ins.mode ? a - b - in : a + b + in;
      lanes<u64>(ctx, ins.slot[0])[i] = (u64)r;
      set_carry(ctx, ins, i, (u64)(r >> 64));
    }
  }
}

// mode: 0 lo, 1 hi; mode2: signed
static void h_madc(Ctx& ctx, const Ins& ins) {
  EACH_ACTIVE(i, ctx.mask) {
    u64 in = (ins.flag & CARRY_IN) ? on(ctx.warp->carry, i) : 0;
    if (ins.reg_size == 4) {
      u32 a = lanes<u32>(ctx, ins.slot[1])[i], b = lanes<u32>(ctx, ins.slot[2])[i];
      u64 product = ins.mode2 ? (u64)((s64)(s32)a * (s32)b) : (u64)a * b;
      u64 r = (ins.mode ? product >> 32 : (u32)product) + lanes<u32>(ctx, ins.slot[3])[i] + in;
      lanes<u32>(ctx, ins.slot[0])[i] = (u32)r;
      set_carry(ctx, ins, i, r >> 32);
    } else {
      u64 a = lanes<u64>(ctx, ins.slot[1])[i], b = lanes<u64>(ctx, ins.slot[2])[i];
      u128 product = ins.mode2 ? (u128)((s128)(s64)a * (s64)b) : (u128)a * b;
      u128 r = (u128)(u64)(ins.mode ? product >> 64 : product) + lanes<u64>(ctx, ins.slot[3])[i] + in;
      lanes<u64>(ctx, ins.slot[0])[i] = (u64)r;
      set_carry(ctx, ins, i, (u64)(r >> 64));
    }
  }
}
