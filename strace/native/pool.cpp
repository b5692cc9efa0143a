// Threads that spin for a while, since the next phase is mostly a few microseconds away, and then sleep.
#include "pool.h"

#include <chrono>

namespace strace {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

constexpr auto SPIN_ALONE = microseconds(20);  // then others who wait for the core are let on it
constexpr auto SPIN = microseconds(200);       // longer than what lies between two passes of a busy server
constexpr int PAUSES_PER_LOOK = 16;
constexpr uint64_t PIECES = 0xffffffff;

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether `holds` did within the time.
template <class Condition>
bool spin(Clock::duration time, Condition holds) {
  Clock::time_point start;
  for (bool first = true;; first = false) {
    for (int i = 0; i < PAUSES_PER_LOOK; ++i) {
      if (holds()) return true;
      pause_briefly();
    }
    const Clock::time_point now = Clock::now();
    if (first) start = now;
    if (now - start >= time) return false;
    if (now - start >= SPIN_ALONE) std::this_thread::yield();
  }
}

}  // namespace

Pool::Pool(int threads) {
  workers_.reserve(threads - 1);
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  published_.notify_all();
  for (auto &worker : workers_) worker.join();
}

bool Pool::has_work() const { return (left_.load() & PIECES) != 0; }

// The number of a piece, or -1 where none is left.
int Pool::take() {
  uint64_t left = left_.load(std::memory_order_acquire);
  while (left & PIECES)
    if (left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel, std::memory_order_acquire))
      return static_cast<int>(left & PIECES) - 1;
  return -1;
}

void Pool::publish(Job job, void *context, int pieces) {
  job_ = job;
  context_ = context;
  done_.store(0, std::memory_order_relaxed);
  const uint64_t phase = (left_.load(std::memory_order_relaxed) >> 32) + 1;
  // The order of these two, and of the same in wait_for_work, is what keeps a worker from sleeping through its call:
  // either it sees the pieces or it is seen parked.
  left_.store(phase << 32 | static_cast<uint32_t>(pieces));
  if (!parked_.load()) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    parked_ = false;
  }
  published_.notify_all();
}

// Until others have done so many pieces of this phase.
void Pool::await(int pieces) {
  const auto all_done = [&] { return done_.load(std::memory_order_acquire) == pieces; };
  while (!spin(SPIN, all_done)) {
  }
}

void Pool::serve(int thread) {
  while (!closing_.load(std::memory_order_relaxed)) {
    const int piece = take();
    if (piece < 0) {
      wait_for_work();
      continue;
    }
    job_(context_, piece, thread);
    done_.fetch_add(1, std::memory_order_release);
  }
}

void Pool::wait_for_work() {
  const auto wanted = [&] { return has_work() || closing_.load(std::memory_order_relaxed); };
  if (spin(SPIN, wanted)) return;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    parked_ = true;
    if (wanted()) return;
    published_.wait(lock);
  }
}

}  // namespace strace
