// The CPU engine from two threads at once, each with a team of three, for ThreadSanitizer (test_races.py builds it).
// It does not see the barriers of libgomp, which was not compiled for it; so a team is made of threads that it does see.
#include <random>
#include <thread>

#include "engine.cpp"

static thread_local int team = 1, own = 0;

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; i++)
    others.emplace_back([=] {
      team = threads, own = i;
      body(data);
    });
  team = threads;
  body(data);
  team = 1;
  for (std::thread& other : others) other.join();
}
int omp_get_num_threads() noexcept { return team; }
int omp_get_thread_num() noexcept { return own; }
int omp_in_parallel() noexcept { return team > 1; }

}  // extern "C"

constexpr i64 SAMPLES = 30, TOKENS = 17, WIDTH = 72, HIDDEN = 200, HEADS = 3, SOURCES = 2, THREADS = 3, REPEATS = 2;

static std::vector<float> random(i64 count) {
  static std::mt19937 generator;
  std::vector<float> found(count);
  for (float& value : found) value = std::normal_distribution<float>(0, 0.1)(generator);
  return found;
}

struct Packed {
  std::vector<float> bias, scale, sums;
  std::vector<char> weight;
  Linear linear;

  Packed(i64 product, i64 outputs, i64 inputs)
      : bias(random(up(outputs, PANEL))), scale(random(up(outputs, PANEL))), sums(random(up(outputs, PANEL))),
        weight(ditfast_packed_bytes(product, outputs, inputs) + 4096) {
    const std::vector<float> values = random(outputs * inputs);
    std::vector<bf16> halves(values.size());
    std::vector<int8_t> bytes(values.size());
    for (size_t i = 0; i < values.size(); i++) {
      uint32_t bits;
      std::memcpy(&bits, &values[i], 4);
      halves[i] = bits >> 16, bytes[i] = int8_t(100 * values[i]);
    }
    const void* from[] = {values.data(), halves.data(), bytes.data()};
    ditfast_pack(product, from[product], outputs, inputs, inputs, 1, weight.data(), THREADS);
    const bool whole = product == BYTE;
    linear = {weight.data(), bias.data(), whole ? scale.data() : nullptr, whole ? sums.data() : nullptr, outputs, inputs};
  }
};

int main() {
  const std::vector<float> x = random(SAMPLES * TOKENS * WIDTH), vectors = random(SAMPLES * WIDTH);
  const std::vector<float> context = random(SAMPLES * SOURCES * 2 * WIDTH), weight = random(HIDDEN * WIDTH);
  const Vector vector{vectors.data(), WIDTH, 0, 0};
  for (const i64 product : {FULL, HALF, BYTE}) {
    const Packed qkv(product, 3 * WIDTH, WIDTH), q(product, WIDTH, WIDTH), proj(product, WIDTH, WIDTH);
    const Packed fc1(product, HIDDEN, WIDTH), fc2(product, WIDTH, HIDDEN);
    const Sublayer chain[] = {
        {SELF_ATTENTION, qkv.linear, proj.linear, vector, vector, vector, 1e-6, HEADS, nullptr, 0},
        {CROSS_ATTENTION, q.linear, proj.linear, vector, vector, vector, 1e-6, HEADS, context.data(), SOURCES},
        {MLP, fc1.linear, fc2.linear, vector, vector, vector, 1e-6, 1, nullptr, 0},
    };
    const Norm norm{vector, vector, 1e-6};
    const FewRowsLinear linears[] = {
        {weight.data(), weight.data(), nullptr, WIDTH}, {weight.data(), weight.data(), nullptr, HIDDEN - WIDTH}};
    const auto call = [&] {
      std::vector<float> x_out(x.size()), u_out(x.size()), y(4 * HIDDEN);
      const char* watched = (const char*)x.data();
      const i64 bytes = x.size() * 4;
      for (i64 i = 0; i < REPEATS; i++) {
        ditfast_spot_check(&watched, &bytes, 1);
        ditfast_hash(&watched, &bytes, 1);
        ditfast_run(chain, 3, &norm, x.data(), x_out.data(), u_out.data(), 0, product, SAMPLES, TOKENS, WIDTH, THREADS);
        ditfast_few_rows(FULL, x.data(), linears, 2, y.data(), 4, WIDTH, THREADS);
      }
    };
    std::thread other(call);
    call();
    other.join();
  }
}
