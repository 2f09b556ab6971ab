// y = x W^T + b for a few rows of x: each row of the weight is fetched once.
#pragma once

#include "parallel.h"

constexpr i64 ROWS_AT_ONCE = 4;
constexpr i64 FETCHED_AHEAD = 1024;  // bytes: over the ends of pages, where the CPU's own prefetching stops

// out[r] = x[r, :] . weight over ``inputs`` values, of rows that lie ``inputs`` apart.
template <int R, class T>
INLINE void dot_products(const float* x, const T* weight, i64 inputs, float* out) {
  Lanes sums[R];
  for (int r = 0; r < R; r++) sums[r] = zeros();
  i64 k = 0;
  for (; k + LANES <= inputs; k += LANES) {
    const Lanes w = load(weight + k);
    _mm_prefetch((const char*)(weight + k) + FETCHED_AHEAD, _MM_HINT_T0);
    for (int r = 0; r < R; r++) sums[r] = fma(load(x + r * inputs + k), w, sums[r]);
  }
  if (k < inputs) {
    const Lanes w = load_first(weight + k, inputs - k);
    for (int r = 0; r < R; r++) sums[r] = fma(load_first(x + r * inputs + k, inputs - k), w, sums[r]);
  }
  for (int r = 0; r < R; r++) out[r] = sum(sums[r]);
}

// x [rows, inputs], weight [outputs, inputs], y [rows, outputs], all of them contiguous; ``scale`` (or null) of each output.
template <class T>
static void multiply_few_rows(
    const float* x, const T* weight, const float* scale, const float* bias, float* y, i64 rows, i64 outputs, i64 inputs,
    i64 threads) {
  parallel(outputs, threads, [&](i64 first, i64 last) {
    for (i64 n = first; n < last; n++)
      for (i64 r = 0; r < rows; r += ROWS_AT_ONCE) {
        const i64 count = std::min(ROWS_AT_ONCE, rows - r);
        const float* in = x + r * inputs;
        float found[ROWS_AT_ONCE];
        switch (count) {
          case 1: dot_products<1>(in, weight + n * inputs, inputs, found); break;
          case 2: dot_products<2>(in, weight + n * inputs, inputs, found); break;
          case 3: dot_products<3>(in, weight + n * inputs, inputs, found); break;
          default: dot_products<ROWS_AT_ONCE>(in, weight + n * inputs, inputs, found);
        }
        for (i64 i = 0; i < count; i++) y[(r + i) * outputs + n] = (scale ? scale[n] * found[i] : found[i]) + bias[n];
      }
  });
}
