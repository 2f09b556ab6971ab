// What is multiplied, and the loop that multiplies: a tile of the result stays in registers while the whole of K goes by.
#pragma once

#include "lanes.h"

#ifdef __AVX512F__
constexpr int ROWS = 8;     // of a tile; with VECTORS: 24 accumulators of 32 registers
constexpr int VECTORS = 3;  // of sixteen columns, side by side in a panel of weights
#else
constexpr int ROWS = 6;  // 12 accumulators of 16 registers
constexpr int VECTORS = 1;
#endif
constexpr int PANEL = VECTORS * LANES;  // columns
constexpr int CELL = 4;                 // bytes of a column's values that one instruction multiplies

#define UNROLL _Pragma("GCC unroll 24")

constexpr i64 up(i64 n, i64 unit) { return (n + unit - 1) / unit * unit; }

// Each kind: the activation and the weight it multiplies, ``DEPTH`` of them along K at a time, and how many are summed in
// registers, at most: longer sums are sums of such, and lose fewer bits.
struct Full {
  using Activation = float;
  using Weight = float;
  static constexpr int DEPTH = 1;
  static constexpr i64 DEEPEST = 128;
  static constexpr bool WIDENS = false;

  INLINE Lanes sums(Lanes tile) { return tile; }

  template <int M, int V>
  INLINE void step(Lanes (&tile)[M][V], const float* a, i64 stride, const char* b) {
    Lanes weights[V];
    UNROLL
    for (int v = 0; v < V; v++) weights[v] = load((const float*)(b + v * 64));
    UNROLL
    for (int m = 0; m < M; m++) {
      const Lanes x = broadcast(a + m * stride);
      UNROLL
      for (int v = 0; v < V; v++) tile[m][v] = fma(x, weights[v], tile[m][v]);
    }
  }
};

#ifdef __AVX512BF16__
// Two products and their sum a lane, accumulated in fp32.
struct Half {
  using Activation = bf16;
  using Weight = bf16;
  static constexpr int DEPTH = 2;
  static constexpr i64 DEEPEST = 512;
  static constexpr bool WIDENS = false;

  INLINE Lanes sums(Lanes tile) { return tile; }

  template <int M, int V>
  INLINE void step(Lanes (&tile)[M][V], const bf16* a, i64 stride, const char* b) {
    Lanes weights[V];
    UNROLL
    for (int v = 0; v < V; v++) weights[v] = load((const float*)(b + v * 64));
    UNROLL
    for (int m = 0; m < M; m++) {
      const Lanes x = broadcast(a + m * stride);
      UNROLL
      for (int v = 0; v < V; v++) tile[m][v] = _mm512_dpbf16_ps(tile[m][v], (__m512bh)x, (__m512bh)weights[v]);
    }
  }
};
#else
// Weights of bf16 that are widened for fp32 activations: half of the memory, at the speed of fp32. For a few rows on their way.
struct Half {
  using Activation = float;
  using Weight = bf16;
  static constexpr int DEPTH = 2;
  static constexpr i64 DEEPEST = Full::DEEPEST;  // so that bits do not depend on the number of rows, which says who multiplies
  static constexpr bool WIDENS = true;

  INLINE Lanes sums(Lanes tile) { return tile; }

  template <int M, int V>
  INLINE void step(Lanes (&tile)[M][V], const float* a, i64 stride, const char* b) {
    half_step(tile, a, stride, b, [](const float* p) { return even_bf16(load(p)); });
    half_step(tile, a + 1, stride, b, [](const float* p) { return odd_bf16(load(p)); });
  }

  template <int M, int V, class Widen>
  INLINE void half_step(Lanes (&tile)[M][V], const float* a, i64 stride, const char* b, Widen widen) {
    Lanes weights[V];
    UNROLL
    for (int v = 0; v < V; v++) weights[v] = widen((const float*)(b + v * 64));
    UNROLL
    for (int m = 0; m < M; m++) {
      const Lanes x = broadcast(a + m * stride);
      UNROLL
      for (int v = 0; v < V; v++) tile[m][v] = fma(x, weights[v], tile[m][v]);
    }
  }
};
#endif

#ifdef __AVX512VNNI__
constexpr bool PAIRS_SATURATE = false;
#else
constexpr bool PAIRS_SATURATE = true;  // products are added in twos, in 16 bits: weights have to leave room for that
#endif

// Unsigned activations times signed weights, four a lane, accumulated in int32, whose bits the tile holds meanwhile.
struct Byte {
  using Activation = uint8_t;
  using Weight = int8_t;
  static constexpr int DEPTH = 4;
  static constexpr i64 DEEPEST = 1 << 16;  // products of 255 and 128 fit into 32 bits
  static constexpr bool WIDENS = false;

  INLINE Lanes sums(Lanes tile) { return from_int32(tile); }

  template <int M, int V>
  INLINE void step(Lanes (&tile)[M][V], const uint8_t* a, i64 stride, const char* b) {
    Lanes weights[V];
    UNROLL
    for (int v = 0; v < V; v++) weights[v] = load((const float*)(b + v * 64));
    UNROLL
    for (int m = 0; m < M; m++) {
      const Lanes x = broadcast(a + m * stride);
      UNROLL
      for (int v = 0; v < V; v++) tile[m][v] = plus_products(tile[m][v], x, weights[v]);
    }
  }
};

// tile[m][v] += a[m, :] * b[:, v] over ``depth`` values of K; rows of a lie ``stride`` values apart, cells of b ``pitch`` bytes.
template <class P, int M, int V, class Meanwhile>
INLINE void accumulate(
    Lanes (&tile)[M][V], const typename P::Activation* a, i64 stride, const char* b, i64 pitch, i64 depth, Meanwhile meanwhile) {
  for (i64 k = 0; k < depth; k += P::DEPTH) {
    P::template step<M, V>(tile, a + k, stride, b);
    b += pitch;
    meanwhile();
  }
}

template <int M, int V>
INLINE void clear(Lanes (&tile)[M][V]) {
  UNROLL
  for (int m = 0; m < M; m++)
    UNROLL
    for (int v = 0; v < V; v++) tile[m][v] = zeros();
}
