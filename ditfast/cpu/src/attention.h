// softmax(q k^T / sqrt(d)) v, a head at a time: its keys and values packed once, its scores a tile of rows at a time.
#pragma once

#include <type_traits>
#include <vector>

#include "parallel.h"
#include "products.h"

#ifdef __AVX512F__
constexpr int KEY_VECTORS = 2;    // of a tile of scores
constexpr int VALUE_ROWS = 4;     // of a tile of the result
constexpr int VALUE_VECTORS = 6;  // of it, at most: head dims up to 96 at once
#else
constexpr int KEY_VECTORS = 1;
constexpr int VALUE_ROWS = ROWS;
constexpr int VALUE_VECTORS = 1;
#endif
constexpr int KEYS = KEY_VECTORS * LANES;

// Heads [samples, tokens or sources, heads, d]: strides in values, of a sample and of a token; heads lie side by side.
template <class T>
struct Heads {
  T* values;
  i64 sample_stride, token_stride;
};

// One head on one thread: buffers are reused by the next.
template <class P>
struct Head {
  using T = typename P::Activation;
  static constexpr int DEPTH = P::DEPTH;

  const i64 tokens, sources, d, vectors, groups;  // vectors of a head; groups: of sources, DEPTH each
  const i64 padded;                               // sources, to whole tiles
  const Lanes scale;
  std::vector<T> keys, values, weights;  // [padded / KEYS][d / DEPTH][KEYS][DEPTH], [groups][vectors * LANES][DEPTH], [ROWS][padded]
  std::vector<float> scores;             // [ROWS][padded]

  Head(i64 tokens, i64 sources, i64 d)
      : tokens(tokens), sources(sources), d(d), vectors((d + LANES - 1) / LANES), groups((sources + DEPTH - 1) / DEPTH),
        padded(up(sources, KEYS)), scale(all(1.f / std::sqrt(float(d)))), keys(padded * up(d, DEPTH)),
        values(up(groups * DEPTH, KEYS) * vectors * LANES), weights(ROWS * padded), scores(ROWS * padded) {}

  void run(const T* q, i64 q_stride, const T* k, const T* v, i64 source_stride, T* out, i64 out_stride) {
    pack_keys(k, source_stride);
    pack_values(v, source_stride);
    for (i64 t = 0; t < tokens; t += ROWS) {
      float inverse[ROWS];
      score(q + t * q_stride, q_stride);
      for (int m = 0; m < ROWS; m++) inverse[m] = softmax(&scores[m * padded], &weights[m * padded]);
      const i64 rows = std::min<i64>(ROWS, tokens - t);
      for (int m = 0; m < rows; m += VALUE_ROWS)
        for (i64 c = 0; c < vectors; c += VALUE_VECTORS)
          mix(m, std::min<i64>(VALUE_ROWS, rows - m), c, inverse, out + t * out_stride, out_stride);
    }
  }

  void pack_keys(const T* k, i64 stride) {
    for (i64 s = 0; s < sources; s++) {
      T* to = &keys[s / KEYS * up(d, DEPTH) * KEYS + s % KEYS * DEPTH];
      for (i64 j = 0; j < d; j++) to[j / DEPTH * KEYS * DEPTH + j % DEPTH] = k[s * stride + j];
    }
  }

  void pack_values(const T* v, i64 stride) {
    for (i64 s = 0; s < sources; s++) {
      T* to = &values[s / DEPTH * vectors * LANES * DEPTH + s % DEPTH];
      for (i64 j = 0; j < d; j++) to[j * DEPTH] = v[s * stride + j];
    }
  }

  void score(const T* q, i64 stride) {
    for (i64 s = 0; s < padded; s += KEYS) {
      Lanes tile[ROWS][KEY_VECTORS];
      clear(tile);
      accumulate<P>(tile, q, stride, (const char*)&keys[s * up(d, DEPTH)], KEYS * CELL, d, [] {});
      UNROLL
      for (int m = 0; m < ROWS; m++)
        UNROLL
        for (int v = 0; v < KEY_VECTORS; v++) store(&scores[m * padded + s + v * LANES], tile[m][v]);
    }
  }

  // The weights of one row's sources, not yet divided by their sum, whose inverse is returned: 0 where no score is above -inf.
  float softmax(float* row, T* to) {
    for (i64 s = sources; s < padded; s++) row[s] = -INFINITY;
    Lanes most = load(row), total = zeros();
    for (i64 s = LANES; s < padded; s += LANES) most = larger(most, load(row + s));
    const float greatest = largest(most);
    const Lanes all_most = all(greatest == -INFINITY ? 0.f : greatest);
    for (i64 s = 0; s < padded; s += LANES) {
      const Lanes weight = keep_first(exponential(mul(sub(load(row + s), all_most), scale)), sources - s);
      total = add(total, weight);
      store(to + s, weight);
    }
    return greatest == -INFINITY ? 0.f : 1.f / sum(total);
  }

  void mix(i64 row, i64 rows, i64 vector, const float* inverse, T* out, i64 stride) {
    switch (std::min<i64>(VALUE_VECTORS, vectors - vector)) {
      case 1: return mix_vectors<1>(row, rows, vector, inverse, out, stride);
#ifdef __AVX512F__
      case 2: return mix_vectors<2>(row, rows, vector, inverse, out, stride);
      case 3: return mix_vectors<3>(row, rows, vector, inverse, out, stride);
      case 4: return mix_vectors<4>(row, rows, vector, inverse, out, stride);
      case 5: return mix_vectors<5>(row, rows, vector, inverse, out, stride);
      case 6: return mix_vectors<6>(row, rows, vector, inverse, out, stride);
#endif
    }
  }

  template <int V>
  void mix_vectors(i64 row, i64 rows, i64 vector, const float* inverse, T* out, i64 stride) {
    Lanes tile[VALUE_ROWS][V];
    clear(tile);
    const char* from = (const char*)&values[vector * LANES * DEPTH];
    accumulate<P>(tile, &weights[row * padded], padded, from, vectors * LANES * CELL, groups * DEPTH, [] {});
    Lanes found[VALUE_ROWS][V];  // a tile that is also read at a place known only later would not stay in registers
    UNROLL
    for (int m = 0; m < VALUE_ROWS; m++)
      UNROLL
      for (int v = 0; v < V; v++) found[m][v] = tile[m][v];
    for (int m = 0; m < rows; m++)
      for (int v = 0; v < V; v++) {
        const i64 column = (vector + v) * LANES;
        store_first(out + (row + m) * stride + column, mul(found[m][v], all(inverse[row + m])), d - column);
      }
  }
};

// Rows of q up to whole tiles can be read.
template <class P, class T>
static void attention(
    Heads<const T> q, Heads<const T> k, Heads<const T> v, Heads<T> out, i64 samples, i64 tokens, i64 sources, i64 heads, i64 d,
    i64 threads) {
  static_assert(std::is_same<T, typename P::Activation>::value, "heads are what the product multiplies");
  parallel(samples * heads, threads, [&](i64 first, i64 last) {
    Head<P> head(tokens, sources, d);
    for (i64 i = first; i < last; i++) {
      const i64 sample = i / heads, column = i % heads * d;
      head.run(
          q.values + sample * q.sample_stride + column, q.token_stride, k.values + sample * k.sample_stride + column,
          v.values + sample * v.sample_stride + column, k.token_stride, out.values + sample * out.sample_stride + column,
          out.token_stride);
    }
  });
}
