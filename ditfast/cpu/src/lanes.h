// Sixteen fp32 lanes: one register of AVX-512, two of AVX2.
#pragma once

#ifdef EMULATED
#include "avx512_emulation.h"  // of the tests
#else
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

using i64 = int64_t;
using bf16 = uint16_t;

constexpr int LANES = 16;

#ifdef __AVX512F__

using Lanes = __m512;

INLINE Lanes zeros() { return _mm512_setzero_ps(); }
INLINE Lanes all(float x) { return _mm512_set1_ps(x); }
INLINE Lanes load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, Lanes x) { _mm512_storeu_ps(p, x); }
INLINE Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
INLINE Lanes sub(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
INLINE Lanes mul(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
INLINE Lanes over(Lanes a, Lanes b) { return _mm512_div_ps(a, b); }
INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c
INLINE Lanes larger(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
INLINE Lanes smaller(Lanes a, Lanes b) { return _mm512_min_ps(a, b); }
INLINE float sum(Lanes x) { return _mm512_reduce_add_ps(x); }
INLINE float largest(Lanes x) { return _mm512_reduce_max_ps(x); }
INLINE Lanes rounded(Lanes x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Lanes times_power_of_2(Lanes x, Lanes n) { return _mm512_scalef_ps(x, n); }
INLINE __m512i bits(Lanes x) { return _mm512_castps_si512(x); }
INLINE Lanes from_int32(Lanes x) { return _mm512_cvtepi32_ps(bits(x)); }
INLINE void store_rounded(uint8_t* p, Lanes x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(x))); }
// Adds to int32 sums the products of unsigned bytes x and signed bytes w, four a lane.
INLINE Lanes plus_products(Lanes sums, Lanes x, Lanes w) {
#ifdef EMULATED
  return _mm512_castsi512_ps(_mm512_dpbusd_epi32(bits(sums), bits(x), bits(w)));
#elif defined(__AVX512VNNI__)
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));  // gcc 12 spills the intrinsic's accumulators
  return sums;
#else
  const __m512i pairs = _mm512_maddubs_epi16(bits(x), bits(w));
  return _mm512_castsi512_ps(_mm512_add_epi32(bits(sums), _mm512_madd_epi16(pairs, _mm512_set1_epi16(1))));
#endif
}
INLINE Lanes even_bf16(Lanes pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(bits(pairs), 16)); }
INLINE Lanes odd_bf16(Lanes pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(bits(pairs), _mm512_set1_epi32(int(0xffff0000))));
}
INLINE Lanes load(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
INLINE Lanes load(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
INLINE void store(bf16* p, Lanes x) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
#else
  // To the nearest, ties to even; what is not a number keeps the bits that say so, and one more.
  const __m512i i = bits(x), odd = _mm512_and_si512(_mm512_srli_epi32(i, 16), _mm512_set1_epi32(1));
  const __m512i near = _mm512_srli_epi32(_mm512_add_epi32(i, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(i, 16), _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, near, quiet)));
#endif
}

#else

struct Lanes {
  __m256 low, high;
};

#define BOTH(op, x) Lanes{op((x).low), op((x).high)}
#define BOTH_OF_2(op, a, b) Lanes{op((a).low, (b).low), op((a).high, (b).high)}

INLINE Lanes zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, Lanes x) { _mm256_storeu_ps(p, x.low), _mm256_storeu_ps(p + 8, x.high); }
INLINE Lanes add(Lanes a, Lanes b) { return BOTH_OF_2(_mm256_add_ps, a, b); }
INLINE Lanes sub(Lanes a, Lanes b) { return BOTH_OF_2(_mm256_sub_ps, a, b); }
INLINE Lanes mul(Lanes a, Lanes b) { return BOTH_OF_2(_mm256_mul_ps, a, b); }
INLINE Lanes over(Lanes a, Lanes b) { return BOTH_OF_2(_mm256_div_ps, a, b); }
INLINE Lanes larger(Lanes a, Lanes b) { return BOTH_OF_2(_mm256_max_ps, a, b); }
INLINE Lanes smaller(Lanes a, Lanes b) { return BOTH_OF_2(_mm256_min_ps, a, b); }
INLINE Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE __m128 halves(__m256 x) { return _mm256_castps256_ps128(x); }
INLINE float sum(Lanes x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  __m128 four = _mm_add_ps(halves(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
INLINE float largest(Lanes x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  __m128 four = _mm_max_ps(halves(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
INLINE __m256 rounded_8(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Lanes rounded(Lanes x) { return BOTH(rounded_8, x); }
INLINE __m256 power_of_2(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE Lanes times_power_of_2(Lanes x, Lanes n) { return mul(x, BOTH(power_of_2, n)); }  // for n from -126 to 127
INLINE __m256 even_8(__m256 x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16)); }
INLINE __m256 odd_8(__m256 x) { return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(int(0xffff0000)))); }
INLINE Lanes even_bf16(Lanes pairs) { return BOTH(even_8, pairs); }
INLINE Lanes odd_bf16(Lanes pairs) { return BOTH(odd_8, pairs); }
INLINE __m256 load_8(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE Lanes load(const bf16* p) { return {load_8(p), load_8(p + 8)}; }
INLINE __m256 load_8(const int8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
INLINE Lanes load(const int8_t* p) { return {load_8(p), load_8(p + 8)}; }
INLINE void store_8(bf16* p, __m256 x) {
  // To the nearest, ties to even; what is not a number keeps the bits that say so, and one more.
  const __m256i i = _mm256_castps_si256(x), top = _mm256_srli_epi32(i, 16), odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
  const __m256i near = _mm256_srli_epi32(_mm256_add_epi32(i, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i chosen = _mm256_blendv_epi8(near, quiet, nan);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1)));
}
INLINE void store(bf16* p, Lanes x) { store_8(p, x.low), store_8(p + 8, x.high); }
INLINE __m256 from_int32_8(__m256 x) { return _mm256_cvtepi32_ps(_mm256_castps_si256(x)); }
INLINE Lanes from_int32(Lanes x) { return BOTH(from_int32_8, x); }
INLINE __m128i rounded_to_int16(__m256 x) {
  const __m256i i = _mm256_cvtps_epi32(x);
  return _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
}
INLINE void store_rounded(uint8_t* p, Lanes x) {
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(rounded_to_int16(x.low), rounded_to_int16(x.high)));
}
static const __m256i ONES = _mm256_set1_epi16(1);
INLINE __m256 plus_products_8(__m256 sums, __m256 x, __m256 w) {
  __m256 products;  // gcc 12 multiplies all of a tile before it adds, and spills; so it does with ONES in a register
  asm("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
      : "+x"(sums), "=&x"(products)
      : "x"(x), "x"(w), "m"(ONES));
  return sums;
}
// Adds to int32 sums the products of unsigned bytes x and signed bytes w, four a lane.
INLINE Lanes plus_products(Lanes sums, Lanes x, Lanes w) {
  return {plus_products_8(sums.low, x.low, w.low), plus_products_8(sums.high, x.high, w.high)};
}

#endif

// The four bytes at p, of whatever is in them, in every lane.
INLINE Lanes broadcast(const void* p) {
  float bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return all(bytes);
}

// The first ``count`` of sixteen, which may be none: where a row ends.
template <class T>
INLINE Lanes load_first(const T* p, i64 count) {
  if (count >= LANES) return load(p);
  T whole[LANES] = {};
  if (count > 0) std::memcpy(whole, p, sizeof(T) * count);
  return load(whole);
}
template <class T>
INLINE void store_first(T* p, Lanes x, i64 count) {
  if (count >= LANES) return store(p, x);
  T whole[LANES];
  store(whole, x);
  if (count > 0) std::memcpy(p, whole, sizeof(T) * count);
}
INLINE Lanes keep_first(Lanes x, i64 count) {  // zeros behind
  if (count >= LANES) return x;
  float whole[LANES];
  store(whole, x);
  return load_first(whole, count);
}

constexpr float LOG2_E = 1.44269504f, LOG2_E_REST = 1.92596303e-8f;  // which has more digits than one float

// 2^(x log2 e): the power of the nearest integer, times a polynomial of what is left, which is off by 2e-8 of it at most.
INLINE Lanes exponential(Lanes x) {
  const Lanes y = larger(all(-87.f), smaller(all(88.f), x));  // x last: then it stays NaN
  const Lanes n = rounded(mul(y, all(LOG2_E))), f = fma(y, all(LOG2_E_REST), fma(y, all(LOG2_E), sub(zeros(), n)));
  Lanes p = all(1.5469732e-4f);
  for (const float c : {1.3400433e-3f, 9.6180253e-3f, 5.5503272e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f}) p = fma(p, f, all(c));
  return times_power_of_2(p, n);
}

// x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3))), which is GELU's tanh form.
INLINE Lanes gelu(Lanes x) {
  const Lanes u = mul(x, fma(mul(x, x), all(-0.0713548163f), all(-1.59576912f)));
  return over(x, add(all(1.f), exponential(u)));
}
