// y = x W^T + b for a few rows of x, of any number of linears: each row of their weights is fetched once, from where it is.
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

INLINE float as_float(float x) { return x; }
INLINE float as_float(bf16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// A linear [outputs, inputs], wherever it lies; ``scale`` (or null) of each output.
struct FewRowsLinear {
  const void* weight;
  const void* bias;
  const float* scale;
  i64 outputs;
};

// y [rows, outputs of all] of x [rows, inputs] through linears side by side; weights of type T and biases of type B, contiguous.
template <class T, class B>
static void multiply_few_rows(
    const float* x, const FewRowsLinear* linears, i64 count, float* y, i64 rows, i64 inputs, i64 threads) {
  i64 columns = 0;
  for (i64 i = 0; i < count; i++) columns += linears[i].outputs;
  const auto output = [&](const FewRowsLinear& linear, i64 n, float* out) {
    const T* weight = (const T*)linear.weight + n * inputs;
    const float bias = as_float(((const B*)linear.bias)[n]), scale = linear.scale ? linear.scale[n] : 1;
    for (i64 r = 0; r < rows; r += ROWS_AT_ONCE) {
      const i64 together = std::min(ROWS_AT_ONCE, rows - r);
      const float* in = x + r * inputs;
      float found[ROWS_AT_ONCE];
      switch (together) {
        case 1: dot_products<1>(in, weight, inputs, found); break;
        case 2: dot_products<2>(in, weight, inputs, found); break;
        case 3: dot_products<3>(in, weight, inputs, found); break;
        default: dot_products<ROWS_AT_ONCE>(in, weight, inputs, found);
      }
      for (i64 i = 0; i < together; i++) out[(r + i) * columns] = scale * found[i] + bias;
    }
  };
  parallel(columns, threads, [&](i64 first, i64 last) {
    i64 begin = 0;  // the linear's first column
    for (i64 i = 0; i < count; begin += linears[i++].outputs)
      for (i64 n = std::max(first, begin); n < std::min(last, begin + linears[i].outputs); n++)
        output(linears[i], n - begin, y + n);
  });
}
