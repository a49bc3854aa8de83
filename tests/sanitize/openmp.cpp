// The part of GCC's OpenMP runtime that csrc/ calls, on std::thread, for ThreadSanitizer.
//
// libgomp is not built for ThreadSanitizer, which therefore sees neither where a team begins and ends nor its
// barriers, and reports races where there are none. GCC compiles `#pragma omp` into calls of the functions below,
// so the kernels run with the code that they always have, and only what is beneath them differs. It orders threads
// where OpenMP promises an order (the begin and the end of a region, barriers) and nowhere else: the counters
// that share out a dynamic loop and a single region are relaxed atomics.
#include <omp.h>

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int kConstructs = 1 << 14;  // loops and single regions of a team, each of which has one counter

struct Team {
  explicit Team(int threads) : size(threads), counters(kConstructs) {}

  void wait_for_all() {
    std::unique_lock<std::mutex> lock(mutex);
    const long here = generation;
    if (++waiting == size) {
      waiting = 0;
      ++generation;
      all_came.notify_all();
    } else {
      all_came.wait(lock, [&] { return generation != here; });
    }
  }

  const int size;
  std::vector<std::atomic<long>> counters;
  std::mutex mutex;
  std::condition_variable all_came;
  int waiting = 0;
  long generation = 0;
};

// Of the calling thread.
struct Member {
  Team* team = nullptr;  // null outside a parallel region
  int number = 0;
  int constructs = 0;  // that this thread has entered
  // Of the loop that it is in.
  std::atomic<long>* counter = nullptr;
  long begin = 0, end = 0, step = 0;
};
thread_local Member self;

std::atomic<int> most_threads{1};

std::atomic<long>& next_counter() {
  if (self.constructs == kConstructs) {
    std::fprintf(stderr, "openmp.cpp: a parallel region has more than %d loops\n", kConstructs);
    std::abort();
  }
  return self.team->counters[self.constructs++];
}

bool next_chunk(long* first, long* past) {
  *first = self.begin + self.counter->fetch_add(self.step, std::memory_order_relaxed);
  if (*first >= self.end) return false;
  *past = *first + self.step < self.end ? *first + self.step : self.end;
  return true;
}

}  // namespace

extern "C" {

void omp_set_num_threads(int threads) { most_threads = threads; }
int omp_get_max_threads() { return most_threads; }
int omp_get_num_procs() { return 64; }
int omp_get_num_threads() { return self.team ? self.team->size : 1; }
int omp_get_thread_num() { return self.number; }

// threads: 0 for as many as omp_get_max_threads() says.
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  const Member outside = self;
  Team team(threads ? static_cast<int>(threads) : omp_get_max_threads());
  const auto run = [&](int number) {
    self = Member{};
    self.team = &team;
    self.number = number;
    body(data);
  };
  std::vector<std::thread> others;
  for (int number = 1; number < team.size; ++number) others.emplace_back(run, number);
  run(0);
  for (std::thread& other : others) other.join();
  self = outside;
}

void GOMP_barrier() { self.team->wait_for_all(); }

bool GOMP_single_start() { return next_counter().exchange(1, std::memory_order_relaxed) == 0; }

// Loops over [begin, end) with the increment 1, in chunks.
bool GOMP_loop_nonmonotonic_dynamic_start(long begin, long end, long increment, long chunk, long* first,
                                          long* past) {
  if (increment != 1) std::abort();
  self.counter = &next_counter();
  self.begin = begin;
  self.end = end;
  self.step = chunk;
  return next_chunk(first, past);
}
bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* past) { return next_chunk(first, past); }
void GOMP_loop_end() { GOMP_barrier(); }
void GOMP_loop_end_nowait() {}

}  // extern "C"
