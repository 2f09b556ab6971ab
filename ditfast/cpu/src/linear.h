// y = x W^T + b over packed weights, with what follows it done to the tile before it leaves the registers.
#pragma once

#include <vector>

#include "parallel.h"
#include "products.h"

// Packed as [panels][K / DEPTH][PANEL][DEPTH], padded with zeros; ``scale`` and ``sums`` (of a column's weights) are int8's.
struct Linear {
  const char* weight;
  const float* bias;
  const float* scale;
  const float* sums;
  i64 outputs, inputs;
};

// Activations [rows, K], ``stride`` values apart. As many rows as whole tiles cover can be read, and K rounded up to DEPTH.
template <class P>
struct Rows {
  const typename P::Activation* values;
  i64 stride;
  const float* scale;  // int8's: value = scale * (stored - zero)
  const float* zero;
};

constexpr i64 SHARE_OF_CACHE = 1 << 18;  // bytes of panels that a core keeps while rows go by
constexpr i64 FEWEST_FOR_WIDENING = 24;  // rows, for which a panel is widened before they go by
constexpr int FEWER_ROWS = 4;            // of a last tile: sixteen rows are two tiles of six and one of these
constexpr i64 UNITS = 4;               // of work, at least, for each thread

// Weights that come next, fetched into the cache meanwhile: a share of them with each tile.
struct Ahead {
  const char* weights;
  i64 bytes;  // for each step
};

// A tile's sums over K. On its own, since what is around it would take the registers of its loop.
template <class P, int M>
static __attribute__((noinline)) void sum_tile(
    const typename P::Activation* a, i64 stride, const char* b, i64 depth, Ahead ahead, Lanes (*total)[VECTORS]) {
  constexpr i64 pitch = PANEL * CELL;
  clear(*(Lanes(*)[M][VECTORS])total);
  for (i64 k = 0; k < depth; k += P::DEEPEST) {
    Lanes tile[M][VECTORS];
    clear(tile);
    accumulate<P>(tile, a + k, stride, b + k / P::DEPTH * pitch, pitch, std::min(P::DEEPEST, depth - k), [&] {
      _mm_prefetch(ahead.weights, _MM_HINT_T1);
      ahead.weights += ahead.bytes;
    });
    UNROLL
    for (int m = 0; m < M; m++)
      UNROLL
      for (int v = 0; v < VECTORS; v++) total[m][v] = add(total[m][v], P::sums(tile[m][v]));
  }
}

template <class P, class Finish>
INLINE void multiply_tile(
    const Linear& w, Rows<P> x, const char* b, Ahead ahead, i64 row, i64 rows, i64 column, i64 depth, const Finish& finish) {
  Lanes total[ROWS][VECTORS];
  const auto sum = rows > FEWER_ROWS ? sum_tile<P, ROWS> : sum_tile<P, FEWER_ROWS>;
  sum(x.values + row * x.stride, x.stride, b, depth, ahead, total);
  for (int v = 0; v < VECTORS; v++) {
    const i64 n = column + v * LANES, count = std::min<i64>(LANES, w.outputs - n);
    if (count <= 0) break;
    const Lanes bias = load(w.bias + n);
    for (int m = 0; m < rows; m++) {
      Lanes y = total[m][v];
      if (w.scale) {
        y = mul(sub(y, mul(all(x.zero[row + m]), load(w.sums + n))), mul(all(x.scale[row + m]), load(w.scale + n)));
      }
      finish(row + m, n, add(y, bias), count);
    }
  }
}

// Neighbours among the panels of a weight.
struct Panels {
  const char* values;
  i64 bytes, depth;  // of each
  i64 first, count;
};

template <class P, class Finish>
INLINE void multiply_panels(
    const Linear& w, Rows<P> x, Panels b, i64 begin, i64 end, const char* next, i64 next_bytes, const Finish& finish) {
  const i64 tiles = (end - begin + ROWS - 1) / ROWS * b.count, share = next_bytes / tiles;
  const i64 steps = b.depth / P::DEPTH, for_each_step = (share + steps - 1) / steps;
  for (i64 row = begin; row < end; row += ROWS)
    for (i64 p = 0; p < b.count; p++) {
      const i64 rows = std::min<i64>(ROWS, end - row), column = (b.first + p) * PANEL;
      multiply_tile<P>(w, x, b.values + p * b.bytes, {next, for_each_step}, row, rows, column, b.depth, finish);
      next += share;
    }
}

// A panel of bf16 cells as the fp32 that Full multiplies.
template <class P>
static void widen(const char* panel, i64 depth, float* wide) {
  for (i64 k = 0; k < depth; k += P::DEPTH)
    for (int v = 0; v < VECTORS; v++) {
      const Lanes pairs = load((const float*)(panel + k / P::DEPTH * PANEL * CELL) + v * LANES);
      store(wide + k * PANEL + v * LANES, even_bf16(pairs));
      store(wide + (k + 1) * PANEL + v * LANES, odd_bf16(pairs));
    }
}

// ``finish(row, column, y, count)`` takes the results, sixteen columns at a time, of which ``count`` are inside.
template <class P, class Finish>
static void multiply(const Linear& w, Rows<P> x, i64 rows, i64 threads, Finish finish) {
  const i64 panels = (w.outputs + PANEL - 1) / PANEL, depth = up(w.inputs, P::DEPTH);
  const i64 panel_bytes = depth / P::DEPTH * PANEL * CELL, cached_bytes = P::WIDENS ? depth * PANEL * CELL : panel_bytes;
  const i64 together = std::max<i64>(1, std::min<i64>(SHARE_OF_CACHE / cached_bytes, 3));
  const i64 parts = threads < 2 ? 1 : std::min((rows + ROWS - 1) / ROWS, (UNITS * threads + panels - 1) / panels);
  const i64 part = up((rows + parts - 1) / parts, ROWS), blocks = (rows + part - 1) / part;
  parallel(blocks * panels, threads, [&](i64 first, i64 last) {
    while (first < last) {
      const i64 block = first / panels, panel = first % panels;
      const i64 count = std::min({together, panels - panel, last - first});
      const i64 begin = block * part, end = std::min(rows, begin + part);
      const Panels b{w.weight + panel * panel_bytes, panel_bytes, depth, panel, count};
      const char* next = b.values + count * panel_bytes;
      if constexpr (P::WIDENS) {
        if (end - begin >= FEWEST_FOR_WIDENING) {
          static thread_local std::vector<float> wide;
          wide.resize(count * depth * PANEL);
          for (i64 p = 0; p < count; p++) widen<P>(b.values + p * panel_bytes, depth, &wide[p * depth * PANEL]);
          const Rows<Full> same{x.values, x.stride, x.scale, x.zero};
          const Panels widened{(const char*)wide.data(), cached_bytes, depth, panel, count};
          multiply_panels<Full>(w, same, widened, begin, end, next, count * panel_bytes, finish);
          first += count;
          continue;
        }
      }
      multiply_panels<P>(w, x, b, begin, end, next, count * panel_bytes, finish);
      first += count;
    }
  });
}

template <class P>
static i64 packed_bytes(i64 outputs, i64 inputs) {
  return up(outputs, PANEL) * up(inputs, P::DEPTH) / P::DEPTH * CELL;
}

// One linear's weights [N, K], of any strides (in values), into their panels.
template <class P>
static void pack(const typename P::Weight* weight, i64 outputs, i64 inputs, i64 row_stride, i64 column_stride, char* packed, i64 threads) {
  using Weight = typename P::Weight;
  const i64 panels = (outputs + PANEL - 1) / PANEL, groups = up(inputs, P::DEPTH) / P::DEPTH;
  parallel(panels, threads, [&](i64 first, i64 last) {
    for (i64 p = first; p < last; p++) {
      Weight* out = (Weight*)packed + p * groups * PANEL * P::DEPTH;
      for (i64 c = 0; c < PANEL; c++) {
        const i64 n = p * PANEL + c;
        for (i64 k = 0; k < groups * P::DEPTH; k++) {
          const bool inside = n < outputs && k < inputs;
          out[(k / P::DEPTH * PANEL + c) * P::DEPTH + k % P::DEPTH] =
              inside ? weight[n * row_stride + k * column_stride] : Weight(0);
        }
      }
    }
  });
}
