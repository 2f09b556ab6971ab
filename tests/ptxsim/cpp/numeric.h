// Integer names, and the number formats of PTX that C++ lacks.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef unsigned __int128 u128;
typedef __int128 s128;
#define INLINE static inline __attribute__((always_inline))
static const u32 FULL = 0xffffffffu;  // all lanes of a warp

static std::string fmt(const char* f, ...) {
  char b[4096];
  va_list a;
  va_start(a, f);
  vsnprintf(b, sizeof b, f, a);
  va_end(a);
  return b;
}

// ---------------------------------------------------------------- bits
template <class T, class U> INLINE T bit_cast(U x) {
  static_assert(sizeof(T) == sizeof(U), "");
  T t;
  memcpy(&t, &x, sizeof t);
  return t;
}
INLINE float as_float(u32 x) { return bit_cast<float>(x); }
INLINE u32 as_bits(float x) { return bit_cast<u32>(x); }
// .ftz: denormals become zeros of their sign.
INLINE float flush_denormal(float x) {
  u32 b = as_bits(x);
  return as_float((b & 0x7f800000u) ? b : (b & 0x80000000u));
}

// ---------------------------------------------------------------- 16-bit and tf32; rn: to nearest even, rz: towards zero
INLINE float bf16_to_f32(u16 x) { return as_float((u32)x << 16); }
INLINE u16 f32_to_bf16_rn(float x) {
  u32 b = as_bits(x);
  u32 r = b + 0x7fff + ((b >> 16) & 1);
  u32 nan = (b & 0x7fffffff) > 0x7f800000;
  return nan ? 0x7fff : (u16)(r >> 16);
}
INLINE u16 f32_to_bf16_rz(float x) {
  u32 b = as_bits(x);
  return (b & 0x7fffffff) > 0x7f800000 ? 0x7fff : (u16)(b >> 16);
}
#if defined(__F16C__)
INLINE float f16_to_f32(u16 x) { return (float)bit_cast<_Float16>(x); }
INLINE u16 f32_to_f16_rn(float x) {
  u16 r = bit_cast<u16>((_Float16)x);
  return (r & 0x7fff) > 0x7c00 ? 0x7fff : r;
}
#else
static float f16_to_f32(u16 h) {
  u32 s = (u32)(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 1023;
  if (e == 0) {
    float f = ldexpf((float)m, -24);
    return s ? -f : f;
  }
  if (e == 31) return as_float(s | 0x7f800000u | (m << 13));
  return as_float(s | ((e + 112) << 23) | (m << 13));
}
static u16 f32_to_f16_rn(float x) {
  u32 b = as_bits(x), s = (b >> 16) & 0x8000, a = b & 0x7fffffff;
  if (a > 0x7f800000) return 0x7fff;
  if (a >= 0x477ff000) return s | 0x7c00;
  if (a < 0x38800000) {
    float f = fabsf(x) * 16777216.f;
    return s | (u16)lrintf(f);
  }
  u32 r = a - 0x38000000;
  r += 0xfff + ((r >> 13) & 1);
  return s | (u16)(r >> 13);
}
#endif
static u16 f32_to_f16_rz(float x) {
  u16 r = f32_to_f16_rn(x);
  float y = f16_to_f32(r);
  if (std::isfinite(x) && fabsf(y) > fabsf(x)) r--;
  return r;
}
// rna: to nearest, ties away from zero
INLINE u32 f32_to_tf32_rna(float x) {
  u32 b = as_bits(x);
  if ((b & 0x7f800000u) == 0x7f800000u) return b & 0x7fffffff ? ((b & 0x7fffff) ? 0x7fffffff : b) : b;
  return (b + 0x1000u) & 0xffffe000u;
}
INLINE u32 f32_to_tf32_rn(float x) {
  u32 b = as_bits(x);
  if ((b & 0x7f800000u) == 0x7f800000u) return b;
  return (b + 0xfffu + ((b >> 13) & 1)) & 0xffffe000u;
}
// A polynomial, good to about 1 ulp, because calls of exp2f do not vectorise. Adding and subtracting 1.5 * 2^23 rounds to an
// integer; the power of two is applied in two halves, so that results near the ends of the range neither overflow nor vanish.
INLINE float exp2_approx(float x) {
  const float shift = 12582912.f;
  float clamped = x < -160.f ? -160.f : (x > 130.f ? 130.f : x);
  float n = (clamped + shift) - shift, f = clamped - n;
  float p = 1.5353362e-4f;
  p = __builtin_fmaf(p, f, 1.3398874e-3f);
  p = __builtin_fmaf(p, f, 9.6184370e-3f);
  p = __builtin_fmaf(p, f, 5.5503324e-2f);
  p = __builtin_fmaf(p, f, 2.4022648e-1f);
  p = __builtin_fmaf(p, f, 6.9314720e-1f);
  p = __builtin_fmaf(p, f, 1.0f);
  int exponent = (int)n, half = exponent >> 1;
  float r = p * as_float((u32)(half + 127) << 23) * as_float((u32)(exponent - half + 127) << 23);
  return x != x ? x : r;
}

// min and max of PTX: -0 is less than +0, which combining the bits of equal operands gives; a number wins over NaN.
static const u32 F32_NAN = 0x7fffffff;
INLINE float min_number(float a, float b) {
  float r = a < b ? a : b;
  if (a == b) r = as_float(as_bits(a) | as_bits(b));
  if (a != a) r = b;
  if (b != b) r = (a != a) ? as_float(F32_NAN) : a;
  return r;
}
INLINE float max_number(float a, float b) {
  float r = a > b ? a : b;
  if (a == b) r = as_float(as_bits(a) & as_bits(b));
  if (a != a) r = b;
  if (b != b) r = (a != a) ? as_float(F32_NAN) : a;
  return r;
}
INLINE float min_nan(float a, float b) { return (a != a || b != b) ? as_float(F32_NAN) : min_number(a, b); }
INLINE float max_nan(float a, float b) { return (a != a || b != b) ? as_float(F32_NAN) : max_number(a, b); }

// ---------------------------------------------------------------- rounding
enum Rounding { RN, RZ, RM, RP, RNA, RNI, RZI, RMI, RPI, RNONE };
INLINE double round_integral(double x, int rounding) {
  switch (rounding) {
    case RZI: case RZ: return std::trunc(x);
    case RMI: case RM: return std::floor(x);
    case RPI: case RP: return std::ceil(x);
    default: return std::nearbyint(x);
  }
}
// To float: the nearest, corrected by one step where it lies on the wrong side.
static float round_directed(double x, int rounding) {
  float f = (float)x;
  if (std::isnan(x) || std::isinf(x)) return f;
  if (rounding == RZ && std::fabs((double)f) > std::fabs(x)) return nextafterf(f, 0.f);
  if (rounding == RM && (double)f > x) return nextafterf(f, -INFINITY);
  if (rounding == RP && (double)f < x) return nextafterf(f, INFINITY);
  return f;
}

// ---------------------------------------------------------------- fp8
static float e4m3_to_f32(u8 v) {
  int e = (v >> 3) & 15, m = v & 7;
  float f = e == 15 && m == 7 ? NAN : e == 0 ? ldexpf((float)m, -9) : ldexpf(1.f + m / 8.f, e - 7);
  return v >> 7 ? -f : f;
}
static float e5m2_to_f32(u8 v) { return f16_to_f32((u16)v << 8); }

// |x| rounded to `bits` bits of mantissa, fewer below the smallest normal number 2^smallest.
static float round_mantissa(float magnitude, int bits, int smallest) {
  int e;
  frexpf(magnitude, &e);
  float unit = ldexpf(1.f, std::max(e - 1, smallest) - bits);
  return rintf(magnitude / unit) * unit;
}
// Encoders saturate: too large a number becomes the largest finite one.
static u8 f32_to_e4m3(float x) {
  u8 sign = std::signbit(x) ? 0x80 : 0;
  if (std::isnan(x)) return 0x7f;
  float v = fabsf(x) >= 448.f ? 448.f : round_mantissa(fabsf(x), 3, -6);
  if (v >= 448.f) return sign | 0x7e;
  if (v < 0.015625f) return sign | (u8)(v * 512.f);  // below 2^-6 in steps of 2^-9
  u32 b = as_bits(v);
  return sign | (u8)((((b >> 23) - 120) << 3) | ((b >> 20) & 7));
}
static u8 f32_to_e5m2(float x) {
  u8 sign = std::signbit(x) ? 0x80 : 0;
  if (std::isnan(x)) return 0x7f;
  float v = fabsf(x) >= 57344.f ? 57344.f : round_mantissa(fabsf(x), 2, -14);
  if (v > 57344.f) return sign | 0x7b;
  return sign | (u8)(f32_to_f16_rn(v) >> 8);  // e5m2 is the upper byte of f16
}
