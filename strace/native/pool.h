// The warm threads of one runner. The caller goes through a pass alone and shares out the work of each phase. Every
// thread has pieces of its own, which it does from the first on; one that has done its own helps another from the last
// on. So a thread reads memory in one direction, the same from pass to pass, and one that the system has taken off its
// core holds nobody up unless it is at a piece.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace strace {

// Which thread does which piece never shows in a result: a piece comes out the same whoever does it.
class Pool {
 public:
  // The caller of `share` is one of the threads, number 0.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool &) = delete;
  Pool &operator=(const Pool &) = delete;

  int threads() const { return static_cast<int>(shares_.size()); }

  // Calls piece(i, thread) once for each i in 0 .. pieces - 1, and returns when all have returned. One call at a time.
  template <class Piece>
  void share(int pieces, Piece &&piece) {
    share_runs(pieces, 1, [&](int first, int last, int thread) {
      for (int i = first; i < last; ++i) piece(i, thread);
    });
  }

  // The same by calls of run(first, last, thread), each for at most `most` pieces, first .. last - 1.
  template <class Run>
  void share_runs(int pieces, int most, Run &&run) {
    if (pieces <= 0) return;
    if (pieces == 1 || threads() == 1) return run(0, pieces, 0);
    using Shared = std::remove_reference_t<Run>;
    const Job job = [](void *context, Pieces some, int thread) {
      (*static_cast<Shared *>(context))(some.first, some.last, thread);
    };
    publish(job, &run, pieces, most);
    await(pieces - work(0));
  }

 private:
  struct Pieces {
    int first, last;
    int count() const { return last - first; }
  };
  using Job = void (*)(void *context, Pieces pieces, int thread);

  // What is left of a thread's own pieces of this phase: the first in the high half, the end in the low one.
  struct alignas(64) Share {
    std::atomic<uint64_t> left{0};
  };

  Pieces own(int thread, int pieces) const;
  Pieces take(int thread);
  Pieces take_from(Share &share, bool front);
  int work(int thread);
  void publish(Job job, void *context, int pieces, int most);
  void await(int pieces);
  void serve(int thread);
  void wait_for_phase(uint64_t last);

  std::vector<Share> shares_;
  Job job_ = nullptr;  // of this phase; read by those who have found a piece of it
  void *context_ = nullptr;
  int most_ = 1;
  alignas(64) std::atomic<uint64_t> phase_{0};  // its number
  alignas(64) std::atomic<int> done_{0};        // pieces of this phase done by other threads than the caller
  alignas(64) std::atomic<bool> parked_{false};
  std::atomic<bool> closing_{false};
  std::mutex mutex_;
  std::condition_variable published_;
  std::vector<std::thread> workers_;
};

}  // namespace strace
