// What is done to whole rows: norm and modulation, and the scale that int8 needs.
#pragma once

#include "parallel.h"

// One vector a sample, or a token (then with a stride between tokens); strides in values. Not there: ``values`` is null.
struct Vector {
  const void* values;
  i64 batch_stride, token_stride;
  i64 half;  // bf16, else fp32

  struct Row {
    const void* values;
    i64 half;

    INLINE Lanes at(const Row& row, i64 column, i64 count) {
      return row.half ? load_first((const bf16*)row.values + column, count) : load_first((const float*)row.values + column, count);
    }
  };

  Row row(i64 sample, i64 token) const {
    const i64 offset = (sample * batch_stride + token * token_stride) * (half ? 2 : 4);
    return {values ? (const char*)values + offset : nullptr, half};
  }
};

constexpr i64 FEWEST_ROWS = 8;  // of a thread

// out = (1 + scale) * (x - mean) / deviation + shift, of rows [samples * tokens, width], and zeros up to ``padded``.
// The mean is a sum of two: rounded, and what that left. Rows without variance show the difference, a thousand times.
template <class Out>
static void norm_modulate(
    const float* x, i64 x_stride, i64 samples, i64 tokens, i64 width, Vector shift, Vector scale, float eps, Out* out,
    i64 out_stride, i64 padded, i64 threads) {
  const i64 rows = samples * tokens;
  parallel(rows, std::min(threads, (rows + FEWEST_ROWS - 1) / FEWEST_ROWS), [&](i64 first, i64 last) {
    for (i64 r = first; r < last; r++) {
      const float* in = x + r * x_stride;
      const Vector::Row shifts = shift.row(r / tokens, r % tokens), scales = scale.row(r / tokens, r % tokens);
      Lanes total = zeros(), left = zeros(), squares = zeros();
      for (i64 i = 0; i < width; i += LANES) total = add(total, load_first(in + i, width - i));
      const Lanes mean = all(sum(total) / float(width));
      for (i64 i = 0; i < width; i += LANES) {
        const Lanes centred = keep_first(sub(load_first(in + i, width - i), mean), width - i);
        left = add(left, centred);
        squares = fma(centred, centred, squares);
      }
      const float rest = sum(left) / float(width);
      const float variance = std::fma(-rest, rest, sum(squares) / float(width));  // in every inlined copy, for equal bits
      const Lanes inverse = all(1.f / std::sqrt(variance + eps)), offset = mul(all(-rest), inverse);
      for (i64 i = 0; i < width; i += LANES) {
        const i64 count = width - i;
        Lanes y = fma(sub(load_first(in + i, count), mean), inverse, offset);
        if (scales.values) y = fma(y, Vector::Row::at(scales, i, count), y);
        if (shifts.values) y = add(y, Vector::Row::at(shifts, i, count));
        store_first(out + r * out_stride + i, y, count);
      }
      for (i64 i = width; i < padded; i++) out[r * out_stride + i] = 0;
    }
  });
}

// Each row's own scale and zero: its least value is stored as 0, its largest as 255. Zeros up to ``padded`` are stored as zero's.
// The scale of a row that is not finite is NaN.
template <class In, class Out>
static void quantise(
    const In* x, i64 x_stride, i64 rows, i64 width, i64 padded, Out* out, i64 out_stride, float* scale, float* zero,
    i64 threads) {
  parallel(rows, std::min(threads, (rows + FEWEST_ROWS - 1) / FEWEST_ROWS), [&](i64 first, i64 last) {
    for (i64 r = first; r < last; r++) {
      const In* in = x + r * x_stride;
      Lanes most = zeros(), least = zeros(), poison = zeros();  // the last stays zero, unless a value is not finite
      for (i64 i = 0; i < width; i += LANES) {
        const Lanes values = load_first(in + i, width - i);
        most = larger(most, values);
        least = smaller(least, values);
        poison = fma(values, zeros(), poison);
      }
      const float low = -largest(sub(zeros(), least)), step = std::max((largest(most) - low) / 255.f, 1e-12f) + sum(poison);
      scale[r] = step;
      zero[r] = std::nearbyint(-low / step);
      const Lanes inverse = all(1.f / step), offset = all(zero[r]);
      for (i64 i = 0; i < padded; i += LANES) {
        const Lanes stored = fma(load_first(in + i, width - i), inverse, offset);
        store_rounded(out + r * out_stride + i, smaller(larger(stored, zeros()), all(255.f)));
      }
    }
  });
}
