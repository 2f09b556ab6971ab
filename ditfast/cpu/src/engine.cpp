// The C interface: a chain of sublayers over packed weights, a few samples at a time, so that activations stay in the cache.
#include <cstdlib>

#include "attention.h"
#include "few_rows.h"
#include "linear.h"
#include "rows.h"

enum Kind : i64 { SELF_ATTENTION, CROSS_ATTENTION, MLP };
enum Product : i64 { FULL, HALF, BYTE };

struct Sublayer {
  i64 kind;
  Linear first, second;  // qkv or q, and proj; fc1 and fc2
  Vector shift, scale, gate;
  double eps;
  i64 heads;
  const void* context;  // of cross-attention: keys and values [samples, sources, 2, width], as the product's attention wants them
  i64 sources;
};

struct Norm {
  Vector shift, scale;
  double eps;
};

constexpr i64 SPOTS = 4;            // of a tensor, that tell whether it was written to
constexpr i64 HASH_LANES = 32;      // of four bytes, which a compiler puts into vectors
constexpr i64 ROWS_A_THREAD = 128;  // of a pass through a sublayer
constexpr i64 ALIGNMENT = 64;

// Off the powers of two, where a tile's rows would all fall into one set of the cache.
constexpr i64 stride_of(i64 width) { return up(width, LANES * 4) + LANES * 4; }

// One a thread, kept for its next call.
struct Scratch {
  char* memory = nullptr;
  size_t size = 0, used = 0;

  ~Scratch() { std::free(memory); }
  void reserve(size_t bytes) {
    used = 0;
    if (bytes <= size) return;
    std::free(memory);
    memory = (char*)std::aligned_alloc(ALIGNMENT, up(bytes, ALIGNMENT));
    size = memory ? bytes : 0;
    if (memory) std::memset(memory, 0, bytes);
  }
  template <class T>
  T* take(i64 rows, i64 stride) {
    T* found = (T*)(memory + used);
    used += bytes_of<T>(rows, stride);
    return found;
  }
  template <class T>
  static size_t bytes_of(i64 rows, i64 stride) {
    return up((rows + ROWS) * stride * i64(sizeof(T)), ALIGNMENT);
  }
};

// What activations are between products that are not fp32, and what attention multiplies then.
#ifdef __AVX512BF16__
using Narrow = Half;
#else
using Narrow = Full;
#endif

template <class P>
struct Pass {
  using AttentionProduct = typename std::conditional<std::is_same<P, Full>::value, Full, Narrow>::type;
  using Plain = typename AttentionProduct::Activation;  // of activations between products

  i64 samples, tokens, width, hidden, threads;
  Plain *normed, *wide, *attended;
  typename P::Activation* operand;  // int8's
  float *scale, *zero;

  static size_t bytes(i64 rows, i64 width, i64 hidden) {
    size_t total = 2 * Scratch::bytes_of<Plain>(rows, stride_of(width)) + Scratch::bytes_of<Plain>(rows, stride_of(hidden));
    return total + Scratch::bytes_of<typename P::Activation>(rows, stride_of(hidden)) + 2 * Scratch::bytes_of<float>(rows, 1);
  }

  Pass(Scratch& scratch, i64 rows, i64 tokens, i64 width, i64 hidden, i64 threads)
      : samples(rows / tokens), tokens(tokens), width(width), hidden(hidden), threads(threads),
        normed(scratch.take<Plain>(rows, stride_of(width))), wide(scratch.take<Plain>(rows, stride_of(hidden))),
        attended(scratch.take<Plain>(rows, stride_of(width))),
        operand(scratch.take<typename P::Activation>(rows, stride_of(hidden))), scale(scratch.take<float>(rows, 1)),
        zero(scratch.take<float>(rows, 1)) {}

  i64 rows() const { return samples * tokens; }

  Rows<P> ready(const Plain* x, i64 columns) {
    if constexpr (std::is_same<Plain, typename P::Activation>::value) {
      return {x, stride_of(columns), nullptr, nullptr};
    } else {
      quantise(x, stride_of(columns), rows(), columns, up(columns, P::DEPTH), operand, stride_of(columns), scale, zero, threads);
      return {operand, stride_of(columns), scale, zero};
    }
  }

  void run(const Sublayer& s, float* x, i64 sample) {
    norm_modulate(
        x, stride_of(width), samples, tokens, width, moved(s.shift, sample), moved(s.scale, sample), float(s.eps), normed,
        stride_of(width), up(width, P::DEPTH), threads);
    if (s.kind == MLP) {
      const i64 stride = stride_of(s.first.outputs);
      multiply<P>(s.first, ready(normed, width), rows(), threads, [&](i64 row, i64 column, Lanes y, i64) {
        store(wide + row * stride + column, gelu(y));  // past the last column zeros, from weights and bias of zeros
      });
      add_to(x, s, wide, s.first.outputs, sample);
    } else {
      const i64 stride = stride_of(s.first.outputs);
      multiply<P>(s.first, ready(normed, width), rows(), threads, [&](i64 row, i64 column, Lanes y, i64) {
        store(wide + row * stride + column, y);
      });
      attend(s, stride, sample);
      add_to(x, s, attended, width, sample);
    }
  }

  void attend(const Sublayer& s, i64 stride, i64 sample) {
    const i64 out_stride = stride_of(width), d = width / s.heads;
    const Heads<const Plain> q{wide, tokens * stride, stride};
    Heads<const Plain> k{wide + width, tokens * stride, stride}, v{wide + 2 * width, tokens * stride, stride};
    i64 sources = tokens;
    if (s.kind == CROSS_ATTENTION) {
      sources = s.sources;
      const Plain* context = (const Plain*)s.context + sample * sources * 2 * width;
      k = {context, sources * 2 * width, 2 * width};
      v = {context + width, sources * 2 * width, 2 * width};
    }
    const Heads<Plain> out{attended, tokens * out_stride, out_stride};
    attention<AttentionProduct>(q, k, v, out, samples, tokens, sources, s.heads, d, threads);
    for (i64 row = 0; row < rows(); row++)
      for (i64 i = width; i < up(width, P::DEPTH); i++) attended[row * out_stride + i] = 0;
  }

  void add_to(float* x, const Sublayer& s, const Plain* branch, i64 columns, i64 sample) {
    multiply<P>(s.second, ready(branch, columns), rows(), threads, [&](i64 row, i64 column, Lanes y, i64 count) {
      float* to = x + row * stride_of(width) + column;
      const Vector::Row gate = s.gate.row(sample + row / tokens, row % tokens);
      store(to, gate.values ? fma(Vector::Row::at(gate, column, count), y, load(to)) : add(y, load(to)));
    });
  }

  static Vector moved(const Vector& v, i64 sample) {
    return {v.row(sample, 0).values, v.batch_stride, v.token_stride, v.half};
  }
};

template <class T>
static void to_stream(const T* x, i64 rows, i64 width, float* stream, i64 threads) {
  parallel(rows, threads, [&](i64 first, i64 last) {
    for (i64 r = first; r < last; r++)
      for (i64 i = 0; i < width; i += LANES) store(stream + r * stride_of(width) + i, load_first(x + r * width + i, width - i));
  });
}

template <class T>
static void from_stream(const float* stream, i64 rows, i64 width, T* x, i64 threads) {
  parallel(rows, threads, [&](i64 first, i64 last) {
    for (i64 r = first; r < last; r++)
      for (i64 i = 0; i < width; i += LANES) store_first(x + r * width + i, load(stream + r * stride_of(width) + i), width - i);
  });
}

template <class P, class T>
static int run(
    const Sublayer* chain, i64 count, Norm final, const T* x, T* x_out, T* u_out, i64 samples, i64 tokens, i64 width,
    i64 threads) {
  static thread_local Scratch scratch;
  i64 hidden = width;
  for (i64 i = 0; i < count; i++) hidden = std::max({hidden, chain[i].first.outputs, chain[i].second.inputs});
  const i64 together = std::min(samples, std::max<i64>(1, ROWS_A_THREAD * threads / tokens)), rows = together * tokens;
  scratch.reserve(Scratch::bytes_of<float>(samples * tokens, stride_of(width)) + Pass<P>::bytes(rows, width, hidden));
  if (!scratch.memory) return 1;
  float* stream = scratch.take<float>(samples * tokens, stride_of(width));
  Pass<P> pass(scratch, rows, tokens, width, hidden, threads);
  to_stream(x, samples * tokens, width, stream, threads);
  for (i64 i = 0; i < count; i++)
    for (i64 sample = 0; sample < samples; sample += together) {
      pass.samples = std::min(together, samples - sample);
      pass.run(chain[i], stream + sample * tokens * stride_of(width), sample);
    }
  if (x_out) from_stream(stream, samples * tokens, width, x_out, threads);
  norm_modulate(
      stream, stride_of(width), samples, tokens, width, final.shift, final.scale, float(final.eps), u_out, width, width, threads);
  return 0;
}

template <class P>
static int run_stored(
    const Sublayer* chain, i64 count, Norm final, const void* x, void* x_out, void* u_out, i64 half, i64 samples, i64 tokens,
    i64 width, i64 threads) {
  if (half) return run<P>(chain, count, final, (const bf16*)x, (bf16*)x_out, (bf16*)u_out, samples, tokens, width, threads);
  return run<P>(chain, count, final, (const float*)x, (float*)x_out, (float*)u_out, samples, tokens, width, threads);
}

extern "C" {

// x [samples, tokens, width] through the chain: x_out (or null) and u_out, its norm. Not 0: no memory, or no such product.
int ditfast_run(
    const Sublayer* chain, i64 count, const Norm* final, const void* x, void* x_out, void* u_out, i64 half, i64 product,
    i64 samples, i64 tokens, i64 width, i64 threads) {
  switch (product) {
    case FULL: return run_stored<Full>(chain, count, *final, x, x_out, u_out, half, samples, tokens, width, threads);
    case HALF: return run_stored<Half>(chain, count, *final, x, x_out, u_out, half, samples, tokens, width, threads);
    case BYTE: return run_stored<Byte>(chain, count, *final, x, x_out, u_out, half, samples, tokens, width, threads);
  }
  return 2;
}

// y = x W^T + b of ``count`` linears side by side, weights and biases stored as a product's are (int8's biases as fp32).
void ditfast_few_rows(
    i64 product, const float* x, const FewRowsLinear* linears, i64 count, float* y, i64 rows, i64 inputs, i64 threads) {
  switch (product) {
    case FULL: return multiply_few_rows<float, float>(x, linears, count, y, rows, inputs, threads);
    case HALF: return multiply_few_rows<bf16, bf16>(x, linears, count, y, rows, inputs, threads);
    case BYTE: return multiply_few_rows<int8_t, float>(x, linears, count, y, rows, inputs, threads);
  }
}

i64 ditfast_packed_bytes(i64 product, i64 outputs, i64 inputs) {
  switch (product) {
    case FULL: return packed_bytes<Full>(outputs, inputs);
    case HALF: return packed_bytes<Half>(outputs, inputs);
    case BYTE: return packed_bytes<Byte>(outputs, inputs);
  }
  return -1;
}

// A hash of some bytes from all over each of the tensors.
uint64_t ditfast_spot_check(const char* const* tensors, const i64* bytes, i64 count) {
  uint64_t hash = 1469598103934665603u;
  for (i64 i = 0; i < count; i++)
    for (i64 spot = 0; spot < SPOTS; spot++) {
      const i64 size = std::min<i64>(8, bytes[i]);
      uint64_t value = 0;
      std::memcpy(&value, tensors[i] + (bytes[i] - size) * spot / (SPOTS - 1) / 4 * 4, size);
      hash = (hash ^ value) * 1099511628211u;
      hash ^= hash >> 32;
    }
  return hash;
}

// A hash of all bytes of some pieces of memory. Every step is a bijection, so that no change of one word is lost.
uint64_t ditfast_hash(const char* const* pieces, const i64* bytes, i64 count) {
  uint32_t lanes[HASH_LANES] = {};
  for (i64 i = 0; i < count; i++) {
    i64 at = 0;
    for (; at + i64(sizeof(lanes)) <= bytes[i]; at += sizeof(lanes)) {
      uint32_t words[HASH_LANES];
      std::memcpy(words, pieces[i] + at, sizeof(words));
      for (i64 lane = 0; lane < HASH_LANES; lane++) {
        const uint32_t mixed = lanes[lane] ^ words[lane];
        lanes[lane] = (mixed << 13 | mixed >> 19) * 2654435761u;
      }
    }
    for (; at < bytes[i]; at++) lanes[0] = (lanes[0] ^ uint8_t(pieces[i][at])) * 2654435761u;
  }
  uint64_t hash = 1469598103934665603u;
  for (const uint32_t lane : lanes) {
    hash = (hash ^ lane) * 1099511628211u;
    hash ^= hash >> 32;
  }
  return hash;
}

i64 ditfast_panel() { return PANEL; }

i64 ditfast_pairs_saturate() { return PAIRS_SATURATE; }

int ditfast_pack(
    i64 product, const void* weight, i64 outputs, i64 inputs, i64 row_stride, i64 column_stride, char* packed, i64 threads) {
  switch (product) {
    case FULL: return pack<Full>((const float*)weight, outputs, inputs, row_stride, column_stride, packed, threads), 0;
    case HALF: return pack<Half>((const bf16*)weight, outputs, inputs, row_stride, column_stride, packed, threads), 0;
    case BYTE: return pack<Byte>((const int8_t*)weight, outputs, inputs, row_stride, column_stride, packed, threads), 0;
  }
  return 2;
}

i64 ditfast_attention_is_half() { return sizeof(Narrow::Activation) == 2; }

}  // extern "C"
