// The workers behind `share`. They spin for the next job as long as a decode step's gaps last, then sleep.
#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <thread>

#include "runtime.h"

namespace foveate {
namespace {

int (*torch_threads)() = nullptr;

constexpr int kSpins = 20000;  // pauses, some ten nanoseconds each

constexpr int kPolite = 64;    // pauses between offers of the core to others

// The gate of the job in hand: how many workers are inside, how many may be, whether it is closed.
constexpr std::uint32_t kInside = 0xFFF, kClosed = 1u << 31;
constexpr int kLimitShift = 12;
alignas(64) std::atomic<std::uint32_t> gate{kClosed};

// Counts jobs; a worker sleeps on its address.
alignas(64) std::atomic<std::uint32_t> jobs{0};
alignas(64) std::atomic<int> sleepers{0};

// Written before the gate opens, read by those inside.
void (*job_body)(void*);
void* job_data;

thread_local bool working = false;  // a job within a job stays on its thread

void futex(int operation, std::uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&jobs), operation | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

// Waits for a job after number `seen`; returns the newest number.
std::uint32_t next_job(std::uint32_t seen) {
  for (int i = 0; i < kSpins; ++i) {
    const std::uint32_t now = jobs.load(std::memory_order_acquire);
    if (now != seen) return now;
    _mm_pause();
    if (i % kPolite == 0) sched_yield();  // to torch's threads, if they want this core
  }
  sleepers.fetch_add(1);
  while (jobs.load() == seen) futex(FUTEX_WAIT, seen);
  sleepers.fetch_sub(1);
  return jobs.load(std::memory_order_acquire);
}

bool enter() {
  std::uint32_t now = gate.load(std::memory_order_acquire);
  while (!(now & kClosed) && (now & kInside) < (now >> kLimitShift))
    if (gate.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) return true;
  return false;
}

void work() {
  working = true;
  for (std::uint32_t seen = 0;;) {
    seen = next_job(seen);
    if (!enter()) continue;
    job_body(job_data);
    gate.fetch_sub(1, std::memory_order_release);
  }
}

// Workers live until the process ends: they hold nothing.
void hire(int n) {
  static int hired = 0;
  for (; hired < n; ++hired) std::thread(work).detach();
}

}  // namespace

void use_openmp(std::uintptr_t max_threads) { torch_threads = reinterpret_cast<int (*)()>(max_threads); }

int max_threads() { return torch_threads ? torch_threads() : 1; }

void share(int n, void (*body)(void*), void* data) {
  if (working || n <= 1) return body(data);
  hire(n - 1);
  job_body = body;
  job_data = data;
  gate.store(std::uint32_t(n - 1) << kLimitShift, std::memory_order_release);
  jobs.fetch_add(1);
  if (sleepers.load() > 0) futex(FUTEX_WAKE, INT_MAX);
  working = true;
  body(data);
  working = false;
  gate.fetch_or(kClosed, std::memory_order_acq_rel);
  for (int i = 0; gate.load(std::memory_order_acquire) & kInside; ++i) {
    _mm_pause();
    if (i > kSpins) sched_yield();
  }
}

}  // namespace foveate
