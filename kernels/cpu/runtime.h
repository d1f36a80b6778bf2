// What every CPU kernel stands on: the instruction sets it may use, and threads.
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

// Where torch keeps its number of threads: the address of its OpenMP runtime's omp_get_max_threads. Before this is
// called, and where torch has no OpenMP, everything runs on the calling thread.
void use_openmp(std::uintptr_t max_threads);

// Threads that may share a job: what torch.set_num_threads said.
int max_threads();

// Runs `body` on the calling thread and on up to `n` - 1 workers, those that come while it runs there; returns when all
// that came are done. So `body` takes its share from a queue, and a job never waits for a worker that the system has
// not scheduled: on a busy machine that wait is a time slice of several milliseconds, for every product of every layer.
void share(int n, void (*body)(void*), void* data);

template <class Body>
void parallel(int n, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  if (n <= 1) return body();
  share(n, [](void* data) { (*static_cast<Plain*>(data))(); }, const_cast<std::remove_const_t<Plain>*>(&body));
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
// calling thread: another would come too late. `work` is the job's cost in multiply-adds, about.
template <class Body>
void for_each(std::int64_t n, double work, Body&& body) {
  const int threads = work < 20e3 || n < 2 ? 1 : max_threads();
  if (threads == 1) {
    for (std::int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  Queue queue(n);
  parallel(threads, [&] {
    for (std::int64_t i; (i = queue.take()) >= 0;) body(i);
  });
}

}  // namespace foveate
