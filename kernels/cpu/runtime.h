// What every CPU kernel stands on: the instruction sets it may use, and torch's own threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <type_traits>

namespace foveate {

// Ascending: a machine that runs one level runs those before it.
enum Level : int { kNone = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };
constexpr int kLevels = 5;

// The highest level that this machine has executed in a probe.
Level probe();

// The level kernels run at; at most what `probe` found. Set once by Python, or by a test that forces a lower one.
extern Level level;

// torch's OpenMP runtime, by the addresses of its entry points: a second pool would spin against it. Before this is
// called, and where torch has no OpenMP, everything runs on the calling thread.
void use_openmp(std::uintptr_t gomp_parallel, std::uintptr_t max_threads, std::uintptr_t thread_num,
                std::uintptr_t num_threads);

// Threads a parallel region would have: what torch.set_num_threads said.
int max_threads();

namespace detail {
void fork_join(void (*body)(void*), void* data, int n_threads);
int thread_num();
int num_threads();
}  // namespace detail

// Runs body(thread, n_threads) on `n` threads and returns when all are done.
template <class Body>
void parallel(int n, Body&& body) {
  if (n <= 1) return body(0, 1);
  using Plain = std::remove_reference_t<Body>;
  auto call = [](void* data) { (*static_cast<Plain*>(data))(detail::thread_num(), detail::num_threads()); };
  detail::fork_join(call, const_cast<std::remove_const_t<Plain>*>(&body), n);
}

// Hands out the items 0..n-1 of one region to whoever is free.
class Queue {
 public:
  explicit Queue(std::int64_t n) : n_(n) {}
  // The next item, or -1 when there is none left.
  std::int64_t take() {
    const std::int64_t item = next_.fetch_add(1, std::memory_order_relaxed);
    return item < n_ ? item : -1;
  }

 private:
  std::atomic<std::int64_t> next_{0};
  const std::int64_t n_;
};

// Calls body(item) for every item in 0..n-1, shared among the threads as they become free. Small jobs stay on the
// calling thread: waking another costs a few microseconds. `work` is the job's cost in multiply-adds, about.
template <class Body>
void for_each(std::int64_t n, double work, Body&& body) {
  const int threads = work < 20e3 || n < 2 ? 1 : max_threads();
  if (threads == 1) {
    for (std::int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  Queue queue(n);
  parallel(threads, [&](int, int) {
    for (std::int64_t i; (i = queue.take()) >= 0;) body(i);
  });
}

}  // namespace foveate
