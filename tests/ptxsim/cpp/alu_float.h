// Floating-point arithmetic.
#pragma once
#include "alu_int.h"

// ---------------------------------------------------------------- f32; Z: .ftz, denormals are zero before and after
#define FLOAT1(NAME, EXPR) \
  template <bool Z> struct NAME { \
    typedef float D, A; \
    INLINE float f(float x) { \
      float a = Z ? flush_denormal(x) : x; \
      float r = EXPR; \
      return Z ? flush_denormal(r) : r; \
    } \
  };
#define FLOAT2(NAME, EXPR) \
  template <bool Z> struct NAME { \
    typedef float D, A, B; \
    INLINE float f(float x, float y) { \
      float a = Z ? flush_denormal(x) : x, b = Z ? flush_denormal(y) : y; \
      float r = EXPR; \
      return Z ? flush_denormal(r) : r; \
    } \
  };
FLOAT1(FAbs, as_float(as_bits(a) & 0x7fffffffu))
FLOAT1(FNeg, as_float(as_bits(a) ^ 0x80000000u))
FLOAT1(FSqrt, __builtin_sqrtf(a))
FLOAT1(FRsqrt, 1.0f / __builtin_sqrtf(a))
FLOAT1(FRcp, 1.0f / a)
FLOAT1(FEx2, exp2_approx(a))
FLOAT1(FLg2, log2f(a))
FLOAT1(FSin, sinf(a))
FLOAT1(FCos, cosf(a))
FLOAT1(FTanh, tanhf(a))
FLOAT2(FAdd, a + b)
FLOAT2(FSub, a - b)
FLOAT2(FMul, (a * b))
FLOAT2(FDiv, a / b)
FLOAT2(FMin, min_number(a, b))
FLOAT2(FMax, max_number(a, b))
template <bool Z> struct FFma {
  typedef float D, A, B, C;
  INLINE float f(float a, float b, float c) {
    return Z ? flush_denormal(__builtin_fmaf(flush_denormal(a), flush_denormal(b), flush_denormal(c)))
             : __builtin_fmaf(a, b, c);
  }
};

#define FLOAT2_PLAIN(NAME, TYPE, EXPR) \
  struct NAME { \
    typedef TYPE D, A, B; \
    INLINE TYPE f(TYPE a, TYPE b) { return EXPR; } \
  };
INLINE float magnitude(float a) { return as_float(as_bits(a) & 0x7fffffffu); }
INLINE float with_xor_of_signs(float x, float a, float b) {
  return as_float(as_bits(x) | ((as_bits(a) ^ as_bits(b)) & 0x80000000u));
}
FLOAT2_PLAIN(FMinNan, float, min_nan(a, b))
FLOAT2_PLAIN(FMaxNan, float, max_nan(a, b))
FLOAT2_PLAIN(FMinXorsign, float, with_xor_of_signs(min_number(magnitude(a), magnitude(b)), a, b))
FLOAT2_PLAIN(FMaxXorsign, float, with_xor_of_signs(max_number(magnitude(a), magnitude(b)), a, b))
FLOAT2_PLAIN(FCopysign, u32, (a & 0x80000000u) | (b & 0x7fffffffu))
OP1(FSat, float, float, a != a ? 0.f : a < 0.f ? 0.f : a > 1.f ? 1.f : a)

// Directed rounding. mode: the rounding mode, flag: ftz. The result in double is exact or near enough for one correction.
enum { DIR_ADD, DIR_SUB, DIR_MUL, DIR_FMA, DIR_DIV, DIR_RCP, DIR_SQRT };
template <int OP> static void h_fdir(Ctx& ctx, const Ins& ins) {
  float *d = lanes<float>(ctx, ins.slot[0]), *a = lanes<float>(ctx, ins.slot[1]);
  float *b = lanes<float>(ctx, ins.slot[2]), *c = lanes<float>(ctx, ins.slot[3]);
  EACH_ACTIVE(i, ctx.mask) {
    double x = a[i], r;
    switch (OP) {
      case DIR_ADD: r = x + b[i]; break;
      case DIR_SUB: r = x - b[i]; break;
      case DIR_MUL: r = x * b[i]; break;
      case DIR_FMA: r = std::fma(x, (double)b[i], (double)c[i]); break;
      case DIR_DIV: r = x / b[i]; break;
      case DIR_RCP: r = 1.0 / x; break;
      default: r = std::sqrt(x);
    }
    float f = round_directed(r, ins.mode);
    d[i] = ins.flag ? flush_denormal(f) : f;
  }
}

// ---------------------------------------------------------------- f64
OP1(DAbs, double, double, std::fabs(a))
OP1(DNeg, double, double, -a)
OP1(DSqrt, double, double, __builtin_sqrt(a))
OP1(DRsqrt, double, double, 1.0 / std::sqrt(a))
OP1(DRcp, double, double, 1.0 / a)
FLOAT2_PLAIN(DAdd, double, a + b)
FLOAT2_PLAIN(DSub, double, a - b)
FLOAT2_PLAIN(DMul, double, (a * b))
FLOAT2_PLAIN(DDiv, double, a / b)
FLOAT2_PLAIN(DMin, double, std::fmin(a, b))
FLOAT2_PLAIN(DMax, double, std::fmax(a, b))
FLOAT2_PLAIN(DCopysign, double, std::copysign(b, a))
struct DFma {
  typedef double D, A, B, C;
  INLINE double f(double a, double b, double c) { return __builtin_fma(a, b, c); }
};

// ---------------------------------------------------------------- 16-bit floats; H: 0 f16, 1 bf16
template <int H> INLINE float half_to_float(u16 x) { return H ? bf16_to_f32(x) : f16_to_f32(x); }
template <int H> INLINE u16 float_to_half(float x) { return H ? f32_to_bf16_rn(x) : f32_to_f16_rn(x); }

// Correctly rounded: the product is exact in double; rounding the sum to odd on the way to float keeps the last rounding from
// being a second one.
template <int H> INLINE u16 half_fma(u16 a, u16 b, u16 c) {
  double s = (double)half_to_float<H>(a) * (double)half_to_float<H>(b) + (double)half_to_float<H>(c);
  float f = (float)s;
  if ((double)f != s && std::isfinite(f)) {
    u32 bits = as_bits(f);
    if (std::fabs((double)f) > std::fabs(s)) bits--;
    f = as_float(bits | 1);
  }
  return float_to_half<H>(f);
}
enum HalfOp {
  HO_ADD, HO_SUB, HO_MUL, HO_FMA, HO_MIN, HO_MAX, HO_MINN, HO_MAXN, HO_NEG, HO_ABS, HO_EX2, HO_TANH, HO_FMARELU
};
template <int H, int OP> INLINE u16 half_op(u16 a, u16 b, u16 c) {
  float x = half_to_float<H>(a), y = half_to_float<H>(b);
  switch (OP) {
    case HO_ADD: return float_to_half<H>(x + y);
    case HO_SUB: return float_to_half<H>(x - y);
    case HO_MUL: return float_to_half<H>(x * y);
    case HO_FMA: return half_fma<H>(a, b, c);
    case HO_FMARELU: {
      u16 r = half_fma<H>(a, b, c);
      float f = half_to_float<H>(r);
      return f > 0.f ? r : (f != f ? 0x7fff : 0);
    }
    case HO_MIN: return float_to_half<H>(min_number(x, y));
    case HO_MAX: return float_to_half<H>(max_number(x, y));
    case HO_MINN: return float_to_half<H>(min_nan(x, y));
    case HO_MAXN: return float_to_half<H>(max_nan(x, y));
    case HO_NEG: return a ^ 0x8000;
    case HO_ABS: return a & 0x7fff;
    case HO_EX2: return float_to_half<H>(exp2_approx(x));
    default: return float_to_half<H>(tanhf(x));
  }
}
template <int H, int OP> static void h_half(Ctx& ctx, const Ins& ins) {
  u16 *d = lanes<u16>(ctx, ins.slot[0]), *a = lanes<u16>(ctx, ins.slot[1]);
  u16 *b = lanes<u16>(ctx, ins.slot[2]), *c = lanes<u16>(ctx, ins.slot[3]);
  u32 m = ctx.mask;
  IVDEP EACH_LANE(i) {
    u16 r = half_op<H, OP>(a[i], b[i], c[i]);
    d[i] = on(m, i) ? r : d[i];
  }
}
template <int H, int OP> static void h_half_x2(Ctx& ctx, const Ins& ins) {
  u32 *d = lanes<u32>(ctx, ins.slot[0]), *a = lanes<u32>(ctx, ins.slot[1]);
  u32 *b = lanes<u32>(ctx, ins.slot[2]), *c = lanes<u32>(ctx, ins.slot[3]);
  u32 m = ctx.mask;
  IVDEP EACH_LANE(i) {
    u32 lo = half_op<H, OP>((u16)a[i], (u16)b[i], (u16)c[i]);
    u32 hi = half_op<H, OP>((u16)(a[i] >> 16), (u16)(b[i] >> 16), (u16)(c[i] >> 16));
    d[i] = on(m, i) ? lo | hi << 16 : d[i];
  }
}
template <int H, bool X2> static Handler half_handler_of(int op) {
#define HALF_CASE(o) \
  case o: return X2 ? (Handler)h_half_x2<H, o> : (Handler)h_half<H, o>;
  switch (op) {
    HALF_CASE(HO_ADD)
    HALF_CASE(HO_SUB)
    HALF_CASE(HO_MUL)
    HALF_CASE(HO_FMA)
    HALF_CASE(HO_MIN)
    HALF_CASE(HO_MAX)
    HALF_CASE(HO_MINN)
    HALF_CASE(HO_MAXN)
    HALF_CASE(HO_NEG)
    HALF_CASE(HO_ABS)
    HALF_CASE(HO_EX2)
    HALF_CASE(HO_TANH)
    HALF_CASE(HO_FMARELU)
  }
  return nullptr;
}
static Handler half_handler(Type t, int op) {
  switch (t) {
    case T_F16: return half_handler_of<0, false>(op);
    case T_BF16: return half_handler_of<1, false>(op);
    case T_F16X2: return half_handler_of<0, true>(op);
    case T_BF16X2: return half_handler_of<1, true>(op);
    default: return nullptr;
  }
}
