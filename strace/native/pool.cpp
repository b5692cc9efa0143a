// Threads that spin for a while, since the next phase is mostly a few microseconds away, and then sleep.
#include "pool.h"

#include <algorithm>
#include <chrono>

namespace strace {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

constexpr auto SPIN_ALONE = microseconds(20);  // then others who wait for the core are let on it
constexpr auto SPIN = microseconds(1000);      // longer than what lies between two passes of a busy server, .3 to .6 ms
constexpr int PAUSES_PER_LOOK = 16;
constexpr int PARTS = 4;                       // of what a thread has left it takes one, so that all end together

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline uint64_t pack(int first, int last) { return static_cast<uint64_t>(first) << 32 | static_cast<uint32_t>(last); }

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

Pool::Pool(int threads) : shares_(threads) {
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

Pool::Pieces Pool::own(int thread, int pieces) const {
  const auto from = [&](int i) { return static_cast<int>(static_cast<int64_t>(pieces) * i / threads()); };
  return {from(thread), from(thread + 1)};
}

// Some of a share's pieces, fewer the fewer are left; none where it is empty.
Pool::Pieces Pool::take_from(Share &share, bool front) {
  uint64_t left = share.left.load(std::memory_order_acquire);
  for (;;) {
    const Pieces all{static_cast<int>(left >> 32), static_cast<int>(left & UINT32_MAX)};
    if (all.count() == 0) return all;
    const int count = std::min((all.count() + PARTS - 1) / PARTS, most_);
    const Pieces taken = front ? Pieces{all.first, all.first + count} : Pieces{all.last - count, all.last};
    const uint64_t rest = front ? pack(taken.last, all.last) : pack(all.first, taken.first);
    if (share.left.compare_exchange_weak(left, rest, std::memory_order_acq_rel, std::memory_order_acquire))
      return taken;
  }
}

// Of a thread's own pieces, else of another's.
Pool::Pieces Pool::take(int thread) {
  Pieces taken = take_from(shares_[thread], true);
  for (int k = 1; k < threads() && taken.count() == 0; ++k) taken = take_from(shares_[(thread + k) % threads()], false);
  return taken;
}

// Pieces of this phase until there are none left; how many.
int Pool::work(int thread) {
  int count = 0;
  for (Pieces taken = take(thread); taken.count(); taken = take(thread)) {
    job_(context_, taken, thread);
    count += taken.count();
    if (thread) done_.fetch_add(taken.count(), std::memory_order_release);
  }
  return count;
}

void Pool::publish(Job job, void *context, int pieces, int most) {
  job_ = job;
  context_ = context;
  most_ = most;
  done_.store(0, std::memory_order_relaxed);
  // Whoever still looks for a piece of the last phase may find one of this: all that it needs is there.
  for (int i = 0; i < threads(); ++i) {
    const Pieces some = own(i, pieces);
    shares_[i].left.store(pack(some.first, some.last), std::memory_order_release);
  }
  // The order of these two, and of the same in wait_for_phase, is what keeps a worker from sleeping through its call:
  // either it sees the phase or it is seen parked.
  phase_.store(phase_.load(std::memory_order_relaxed) + 1);
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
  for (uint64_t last = 0; !closing_.load(std::memory_order_relaxed);) {
    wait_for_phase(last);
    last = phase_.load(std::memory_order_acquire);
    work(thread);
  }
}

void Pool::wait_for_phase(uint64_t last) {
  const auto wanted = [&] { return phase_.load() != last || closing_.load(std::memory_order_relaxed); };
  if (spin(SPIN, wanted)) return;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    parked_ = true;
    if (wanted()) return;
    published_.wait(lock);
  }
}

}  // namespace strace
