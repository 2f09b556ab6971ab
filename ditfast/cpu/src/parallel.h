// Loops over OpenMP's threads: those of torch, which has loaded the same library, and as many as torch was told to use.
#pragma once

#include <omp.h>

#include <algorithm>

#include "lanes.h"

// ``body(first, last)`` for shares of ``count`` that differ by one at most; on the calling thread inside of another loop.
template <class Body>
static void parallel(i64 count, i64 threads, Body body) {
  threads = std::min(threads, count);
  if (threads < 2 || omp_in_parallel()) {
    if (count) body(i64(0), count);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const i64 team = omp_get_num_threads(), own = omp_get_thread_num();
    const i64 first = count * own / team, last = count * (own + 1) / team;
    if (first < last) body(first, last);
  }
}
