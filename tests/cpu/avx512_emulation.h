// What the engine asks of AVX-512, with its BF16 and VNNI extensions, on a CPU that has none: to test, not to be fast.
// Each is the pseudo-code of Intel's intrinsics guide, lane by lane.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
#define __AVX512BF16__ 1
#define __AVX512VNNI__ 1

namespace emulated {

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));

template <class To, class From>
static inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
template <class V, class Function>
static inline V each(Function function) {
  V found;
  for (int i = 0; i < 16; i++) found[i] = function(i);
  return found;
}
static inline F loadu(const void* p) {
  F x;
  std::memcpy(&x, p, 64);
  return x;
}
static inline F all(float x) {  // by its bits, which may be those of anything: 0 + x would quiet a NaN
  return each<F>([&](int) { return x; });
}
static inline uint16_t to_bf16(float x) {
  const uint32_t i = as<uint32_t>(x);
  return std::isnan(x) ? uint16_t(i >> 16 | 0x40) : uint16_t((i + 0x7fff + (i >> 16 & 1)) >> 16);
}
static inline float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? 0.f : x; }
static inline float from_bf16(uint16_t x) { return flushed(as<float>(uint32_t(x) << 16)); }
static inline F dpbf16(F sum, F a, F b) {
  return each<F>([&](int i) {
    const U x = as<U>(a), y = as<U>(b);
    const float odd = std::fma(from_bf16(x[i] >> 16), from_bf16(y[i] >> 16), sum[i]);
    return std::fma(from_bf16(uint16_t(x[i])), from_bf16(uint16_t(y[i])), odd);
  });
}
static inline I dpbusd(I sum, I a, I b) {
  return each<I>([&](int i) {
    int32_t total = sum[i];
    for (int j = 0; j < 4; j++) total += int(uint8_t(uint32_t(a[i]) >> 8 * j)) * int(int8_t(uint32_t(b[i]) >> 8 * j));
    return total;
  });
}

}  // namespace emulated

#define __m512 emulated::F
#define __m512i emulated::I
#define __m512bh emulated::F
#define _mm512_setzero_ps() (emulated::F{})
#define _mm512_setzero_si512() (emulated::I{})
#define _mm512_set1_ps(x) emulated::all(x)
#define _mm512_set1_epi32(x) (emulated::I{} + int(x))
#define _mm512_loadu_ps(p) emulated::loadu(p)
#define _mm512_loadu_si512(p) emulated::as<emulated::I>(emulated::loadu(p))
#define _mm512_storeu_ps(p, x) ([](float* to, emulated::F from) { std::memcpy(to, &from, 64); }(p, x))
#define _mm512_add_ps(a, b) ((a) + (b))
#define _mm512_sub_ps(a, b) ((a) - (b))
#define _mm512_mul_ps(a, b) ((a) * (b))
#define _mm512_div_ps(a, b) ((a) / (b))
#define _mm512_fmadd_ps(a, b, c) \
  ([](emulated::F x, emulated::F y, emulated::F z) { return emulated::each<emulated::F>([&](int i) { return std::fma(x[i], y[i], z[i]); }); }(a, b, c))
#define _mm512_max_ps(a, b) ([](emulated::F x, emulated::F y) { return x > y ? x : y; }(a, b))
#define _mm512_min_ps(a, b) ([](emulated::F x, emulated::F y) { return x < y ? x : y; }(a, b))
#define _mm512_reduce_add_ps(x) ([](emulated::F v) { float t = 0; for (int i = 0; i < 16; i++) t += v[i]; return t; }(x))
#define _mm512_reduce_max_ps(x) ([](emulated::F v) { float t = v[0]; for (int i = 1; i < 16; i++) t = std::fmax(t, v[i]); return t; }(x))
#define _mm512_roundscale_ps(x, how) ([](emulated::F v) { return emulated::each<emulated::F>([&](int i) { return std::nearbyint(v[i]); }); }(x))
#define _mm512_scalef_ps(x, n) \
  ([](emulated::F v, emulated::F e) { return emulated::each<emulated::F>([&](int i) { return std::ldexp(v[i], int(std::floor(e[i]))); }); }(x, n))
#define _mm512_castps_si512(x) emulated::as<emulated::I>(x)
#define _mm512_castsi512_ps(x) emulated::as<emulated::F>(x)
#define _mm512_slli_epi32(x, n) emulated::as<emulated::I>(emulated::as<emulated::U>(x) << (n))
#define _mm512_and_si512(a, b) ((a) & (b))
#define _mm512_cvtepu16_epi32(x) \
  ([](__m256i v) { uint16_t s[16]; std::memcpy(s, &v, 32); return emulated::each<emulated::I>([&](int i) { return int(s[i]); }); }(x))
#define _mm512_cvtepi8_epi32(x) \
  ([](__m128i v) { int8_t s[16]; std::memcpy(s, &v, 16); return emulated::each<emulated::I>([&](int i) { return int(s[i]); }); }(x))
#define _mm512_cvtneps_pbh(x) \
  ([](emulated::F v) { uint16_t s[16]; for (int i = 0; i < 16; i++) s[i] = emulated::to_bf16(emulated::flushed(v[i])); return emulated::as<__m256i>(s); }(x))
#define _mm512_dpbf16_ps(sum, a, b) emulated::dpbf16(sum, a, b)
#define _mm512_dpbusd_epi32(sum, a, b) emulated::dpbusd(sum, a, b)
#define _mm512_cvtepi32_ps(x) ([](emulated::I v) { return emulated::each<emulated::F>([&](int i) { return float(v[i]); }); }(x))
#define _mm512_cvtps_epi32(x) ([](emulated::F v) { return emulated::each<emulated::I>([&](int i) { return int(std::nearbyint(v[i])); }); }(x))
#define _mm512_cvtusepi32_epi8(x) \
  ([](emulated::I v) { uint8_t s[16]; for (int i = 0; i < 16; i++) s[i] = uint8_t(uint32_t(v[i]) > 255 ? 255 : v[i]); return emulated::as<__m128i>(s); }(x))
