// cvt: fast handlers for the conversions that kernels are full of, one general handler for all others.
#pragma once
#include <limits>

#include "alu_float.h"

template <class D, class S> static void h_cvt_int(Ctx& ctx, const Ins& ins) {
  D* d = lanes<D>(ctx, ins.slot[0]);
  S* a = lanes<S>(ctx, ins.slot[1]);
  u32 m = ctx.mask;
  if (sizeof(D) == sizeof(S) || m != FULL) {
    EACH_ACTIVE(i, m) d[i] = (D)a[i];
  } else {  // registers of different widths are different registers
    IVDEP EACH_LANE(i) d[i] = (D)a[i];
  }
}

// mode: rounding; long double holds every 64-bit integer, so one step corrects the rounding of the cast.
template <class S> static void h_cvt_int_f32(Ctx& ctx, const Ins& ins) {
  float* d = lanes<float>(ctx, ins.slot[0]);
  S* a = lanes<S>(ctx, ins.slot[1]);
  u32 m = ctx.mask;
  if (ins.mode == RN) {
    if (m == FULL) {
      IVDEP EACH_LANE(i) d[i] = (float)a[i];
    } else {
      EACH_ACTIVE(i, m) d[i] = (float)a[i];
    }
    return;
  }
  EACH_ACTIVE(i, m) {
    float f = (float)a[i];
    long double x = (long double)a[i];
    if (ins.mode == RZ && fabsl(f) > fabsl(x)) f = nextafterf(f, 0);
    if (ins.mode == RM && f > x) f = nextafterf(f, -INFINITY);
    if (ins.mode == RP && f < x) f = nextafterf(f, INFINITY);
    d[i] = f;
  }
}

// addr_size: width of the operand; flag bit 0: ftz, bit 1: the 16-bit operand is bf16. Out of range saturates; NaN gives 0, or
// the smallest 64-bit integer.
template <class D> static void h_cvt_float_int(Ctx& ctx, const Ins& ins) {
  typedef std::numeric_limits<D> Limits;
  const double lo = (double)Limits::min(), hi = (double)Limits::max();
  D* d = lanes<D>(ctx, ins.slot[0]);
  EACH_ACTIVE(i, ctx.mask) {
    double x;
    if (ins.addr_size == 4) {
      float f = lanes<float>(ctx, ins.slot[1])[i];
      x = ins.flag & 1 ? flush_denormal(f) : f;
    } else if (ins.addr_size == 8) {
      x = lanes<double>(ctx, ins.slot[1])[i];
    } else {
      u16 h = lanes<u16>(ctx, ins.slot[1])[i];
      x = ins.flag & 2 ? bf16_to_f32(h) : f16_to_f32(h);
    }
    if (x != x) {
      d[i] = sizeof(D) == 8 ? (D)((u64)1 << 63) : 0;
      continue;
    }
    x = round_integral(x, ins.mode);
    d[i] = x <= lo ? Limits::min() : x >= hi ? Limits::max() : (D)x;
  }
}

template <int H> static void h_cvt_f32_half(Ctx& ctx, const Ins& ins) {
  u16* d = lanes<u16>(ctx, ins.slot[0]);
  float* a = lanes<float>(ctx, ins.slot[1]);
  EACH_ACTIVE(i, ctx.mask) d[i] = float_to_half<H>(a[i]);
}
template <int H> static void h_cvt_half_f32(Ctx& ctx, const Ins& ins) {
  float* d = lanes<float>(ctx, ins.slot[0]);
  u16* a = lanes<u16>(ctx, ins.slot[1]);
  u32 m = ctx.mask;
  if (m == FULL) {
    IVDEP EACH_LANE(i) d[i] = half_to_float<H>(a[i]);
  } else {
    EACH_ACTIVE(i, m) d[i] = half_to_float<H>(a[i]);
  }
}
// The first operand is the high half. flag: relu
template <int H> static void h_cvt_pack_half(Ctx& ctx, const Ins& ins) {
  u32* d = lanes<u32>(ctx, ins.slot[0]);
  float *a = lanes<float>(ctx, ins.slot[1]), *b = lanes<float>(ctx, ins.slot[2]);
  u32 m = ctx.mask;
  if (ins.mode == RN && !ins.flag) {
    IVDEP EACH_LANE(i) {
      u32 r = ((u32)float_to_half<H>(a[i]) << 16) | float_to_half<H>(b[i]);
      d[i] = on(m, i) ? r : d[i];
    }
    return;
  }
  auto convert = [&](float x) {
    if (ins.flag && x < 0) x = 0;
    if (ins.mode != RZ) return float_to_half<H>(x);
    return H ? f32_to_bf16_rz(x) : f32_to_f16_rz(x);
  };
  EACH_ACTIVE(i, m) d[i] = ((u32)convert(a[i]) << 16) | convert(b[i]);
}
static void h_cvt_tf32(Ctx& ctx, const Ins& ins) {
  u32* d = lanes<u32>(ctx, ins.slot[0]);
  float* a = lanes<float>(ctx, ins.slot[1]);
  u32 m = ctx.mask;
  if (ins.mode == RNA) {
    IVDEP EACH_LANE(i) {
      u32 r = f32_to_tf32_rna(a[i]);
      d[i] = on(m, i) ? r : d[i];
    }
  } else {
    EACH_ACTIVE(i, m) d[i] = ins.mode == RZ ? as_bits(a[i]) & 0xffffe000u : f32_to_tf32_rn(a[i]);
  }
}

// ---------------------------------------------------------------- fp8 pairs; E: 0 e4m3, 1 e5m2
template <int E> INLINE u16 pack_fp8(float hi, float lo) {
  return E ? (f32_to_e5m2(hi) << 8 | f32_to_e5m2(lo)) : (f32_to_e4m3(hi) << 8 | f32_to_e4m3(lo));
}
template <int E> static void h_cvt_f32_fp8x2(Ctx& ctx, const Ins& ins) {
  u16* d = lanes<u16>(ctx, ins.slot[0]);
  float *a = lanes<float>(ctx, ins.slot[1]), *b = lanes<float>(ctx, ins.slot[2]);
  EACH_ACTIVE(i, ctx.mask) d[i] = pack_fp8<E>(a[i], b[i]);
}
template <int E> static void h_cvt_f16x2_fp8x2(Ctx& ctx, const Ins& ins) {
  u16* d = lanes<u16>(ctx, ins.slot[0]);
  u32* a = lanes<u32>(ctx, ins.slot[1]);
  EACH_ACTIVE(i, ctx.mask) d[i] = pack_fp8<E>(f16_to_f32(a[i] >> 16), f16_to_f32((u16)a[i]));
}
template <int E> static void h_cvt_fp8x2_f16x2(Ctx& ctx, const Ins& ins) {
  u32* d = lanes<u32>(ctx, ins.slot[0]);
  u16* a = lanes<u16>(ctx, ins.slot[1]);
  auto decode = [](u8 x) { return f32_to_f16_rn(E ? e5m2_to_f32(x) : e4m3_to_f32(x)); };
  EACH_ACTIVE(i, ctx.mask) {
    u16 v = a[i];
    d[i] = ((u32)decode(v >> 8) << 16) | decode((u8)v);
  }
}

// ---------------------------------------------------------------- everything else
// An integer operand may be narrower than its register; the bits above it are not looked at.
static s128 integer_operand(Ctx& ctx, const Ins& ins, Type t, int i) {
  u64 v;
  switch (ins.addr_size) {
    case 2: v = lanes<u16>(ctx, ins.slot[1])[i]; break;
    case 4: v = lanes<u32>(ctx, ins.slot[1])[i]; break;
    default: v = lanes<u64>(ctx, ins.slot[1])[i];
  }
  int bits = 8 * std::min(type_size(t), (int)ins.addr_size), unused = 64 - bits;
  return is_signed(t) ? (s128)((s64)(v << unused) >> unused) : (s128)(v << unused >> unused);
}

// mode: rounding; slot[4], slot[5]: types of result and operand; flag bit 0: ftz, 1: sat, 2: relu; reg_size, addr_size:
// widths of the registers. Every operand is exact in double or in a 128-bit integer.
static void h_cvt_general(Ctx& ctx, const Ins& ins) {
  Type dst = (Type)ins.slot[4], src = (Type)ins.slot[5];
  bool ftz = ins.flag & 1, sat = ins.flag & 2, relu = ins.flag & 4, from_int = !is_float(src);
  int rounding = ins.mode;
  u32 d = ins.slot[0], a = ins.slot[1];
  EACH_ACTIVE(i, ctx.mask) {
    double x = 0;
    s128 integer = 0;
    switch (src) {
      case T_F32: x = ftz ? flush_denormal(lanes<float>(ctx, a)[i]) : lanes<float>(ctx, a)[i]; break;
      case T_F64: x = lanes<double>(ctx, a)[i]; break;
      case T_F16: x = f16_to_f32(lanes<u16>(ctx, a)[i]); break;
      case T_BF16: x = bf16_to_f32(lanes<u16>(ctx, a)[i]); break;
      default: integer = integer_operand(ctx, ins, src, i); x = (double)integer;
    }
    if (!from_int && rounding >= RNI && rounding <= RPI && is_float(dst)) x = round_integral(x, rounding);
    if (sat && is_float(dst)) x = x != x ? 0 : x < 0 ? 0 : x > 1 ? 1 : x;
    if (relu && x < 0) x = 0;
    switch (dst) {
      case T_F64: lanes<double>(ctx, d)[i] = x; break;
      case T_F32: {
        bool directed = rounding == RZ || rounding == RM || rounding == RP;
        float f = from_int ? (float)integer : directed ? round_directed(x, rounding) : (float)x;
        lanes<float>(ctx, d)[i] = ftz ? flush_denormal(f) : f;
        break;
      }
      case T_F16: lanes<u16>(ctx, d)[i] = rounding == RZ ? f32_to_f16_rz((float)x) : f32_to_f16_rn((float)x); break;
      case T_BF16: lanes<u16>(ctx, d)[i] = rounding == RZ ? f32_to_bf16_rz((float)x) : f32_to_bf16_rn((float)x); break;
      default: {
        int bits = 8 * type_size(dst);
        s128 lo = is_signed(dst) ? -((s128)1 << (bits - 1)) : 0;
        s128 hi = is_signed(dst) ? ((s128)1 << (bits - 1)) - 1 : ((s128)1 << bits) - 1;
        if (!from_int) {
          x = round_integral(x, rounding);
          integer = x != x ? 0 : x <= (double)lo ? lo : x >= (double)hi ? hi : (s128)x;
        } else if (sat) {
          integer = integer < lo ? lo : integer > hi ? hi : integer;
        }
        u64 r = (u64)integer << (64 - bits);
        r = is_signed(dst) ? (u64)((s64)r >> (64 - bits)) : r >> (64 - bits);
        if (ins.reg_size == 2) lanes<u16>(ctx, d)[i] = (u16)r;
        else if (ins.reg_size == 4) lanes<u32>(ctx, d)[i] = (u32)r;
        else lanes<u64>(ctx, d)[i] = r;
      }
    }
  }
}
