// How near to its core's peak the CPU engine's tile comes, in fp32 and int8, on one thread.
//
//     g++ -O3 -std=c++17 -fopenmp -march=native -Iditfast/cpu/src benchmarks/cpu_tile.cpp -o cpu_tile && ./cpu_tile
//
// The peak is a loop on registers alone. Each figure is the best of a second's runs, or of as many seconds as the first argument
// says. Weights of 90 MB come from memory, others from the cache; those in int8 have four times the outputs, for as many bytes.
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "linear.h"

static double seconds_each = 1.0;
constexpr i64 STRIDE_PADDING = 64;

template <class Run>
static double best_seconds(Run run) {
  double best = 1e9, total = 0;
  while (total < seconds_each) {
    const auto start = std::chrono::steady_clock::now();
    run();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::min(best, seconds);
    total += seconds;
  }
  return best;
}

template <class T>
static T* filled_with_zeros(i64 count) {
  T* found = (T*)std::aligned_alloc(64, up(count * i64(sizeof(T)), 64));
  std::memset((void*)found, 0, count * sizeof(T));
  return found;
}

// Thousand millions of operations a second: ``depth`` multiplications and as many additions a lane each time.
template <class Op>
static double peak(int depth, Op op) {
  constexpr i64 repeats = 1 << 20;
  constexpr int accumulators = ROWS * VECTORS;
  const double seconds = best_seconds([&] {
    Lanes sums[accumulators];
    for (int i = 0; i < accumulators; i++) sums[i] = all(float(i));
    for (i64 k = 0; k < repeats; k++) {
      UNROLL
      for (int i = 0; i < accumulators; i++) sums[i] = op(sums[i]);
    }
    for (int i = 0; i < accumulators; i++) asm volatile("" : : "m"(sums[i]));  // they are wanted
  });
  return 2e-9 * depth * LANES * accumulators * repeats / seconds;
}

template <class P>
static double product(i64 rows, i64 inputs, i64 outputs) {
  const i64 stride = up(inputs, STRIDE_PADDING) + STRIDE_PADDING, wide = up(outputs, PANEL);
  auto* x = filled_with_zeros<typename P::Activation>((rows + ROWS) * stride);
  auto* weight = filled_with_zeros<char>(packed_bytes<P>(outputs, inputs));
  auto *bias = filled_with_zeros<float>(wide), *y = filled_with_zeros<float>(rows * wide);
  const Linear linear{weight, bias, nullptr, nullptr, outputs, inputs};
  const double seconds = best_seconds([&] {
    multiply<P>(linear, Rows<P>{x, stride, nullptr, nullptr}, rows, 1, [&](i64 row, i64 column, Lanes found, i64) {
      store(y + row * wide + column, found);
    });
  });
  for (void* memory : {(void*)x, (void*)weight, (void*)bias, (void*)y}) std::free(memory);
  return 2e-9 * rows * inputs * outputs / seconds;
}

int main(int count, char** arguments) {
  if (count > 1) seconds_each = std::atof(arguments[1]);
  Lanes x = all(0.5f);
  asm volatile("" : "+m"(x));  // a value that the compiler does not know
  const double full = peak(1, [&](Lanes sums) { return fma(x, x, sums); });
  const double byte = peak(4, [&](Lanes sums) { return plus_products(sums, x, x); });
  std::printf("%-28s %7.1f GFLOP/s fp32 %7.1f GOP/s int8\n", "registers alone", full, byte);
  const i64 shapes[][3] = {{256, 384, 1536}, {256, 768, 3072}, {256, 3072, 768}, {64, 1024, 4096}, {16, 384, 1536},
                           {16, 384, 61440}, {64, 1024, 24576}};
  for (const auto& [rows, inputs, outputs] : shapes) {
    const double fp32 = product<Full>(rows, inputs, outputs), int8 = product<Byte>(rows, inputs, outputs * 4);
    std::printf(
        "%5ld x [%5ld, %4ld], memory %3ld MB %5.1f (%3.0f%%) %14.1f (%3.0f%%)\n", rows, outputs, inputs, outputs * inputs >> 18, fp32,
        100 * fp32 / full, int8, 100 * int8 / byte);
  }
}
