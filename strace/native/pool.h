// The warm threads of one runner. The caller goes through a pass alone and shares out the work of each phase; whoever
// is free takes the next piece. A thread that the system has taken off its core holds nobody up unless it has a piece.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace strace {

// Which thread takes which piece never shows in a result: a piece comes out the same whoever does it.
class Pool {
 public:
  // The caller of `share` is one of the threads, number 0.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool &) = delete;
  Pool &operator=(const Pool &) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls piece(i, thread) once for each i in 0 .. pieces - 1, and returns when all have returned. One call at a time.
  template <class Piece>
  void share(int pieces, Piece &&piece) {
    if (pieces <= 1 || workers_.empty()) {
      for (int i = 0; i < pieces; ++i) piece(i, 0);
      return;
    }
    using Shared = std::remove_reference_t<Piece>;
    publish([](void *context, int i, int thread) { (*static_cast<Shared *>(context))(i, thread); }, &piece, pieces);
    int own = 0;
    for (int i = take(); i >= 0; i = take(), ++own) piece(i, 0);
    await(pieces - own);
  }

 private:
  using Job = void (*)(void *context, int piece, int thread);

  int take();
  void publish(Job job, void *context, int pieces);
  void await(int pieces);
  void serve(int thread);
  void wait_for_work();
  bool has_work() const;

  // Phase in the high half, pieces left to take in the low one: a thread that has slept through a phase cannot take a
  // piece of the next by mistake.
  alignas(64) std::atomic<uint64_t> left_{0};
  Job job_ = nullptr;  // of this phase; read by those who have taken a piece of it
  void *context_ = nullptr;
  alignas(64) std::atomic<int> done_{0};  // pieces of this phase done by other threads than the caller
  alignas(64) std::atomic<bool> parked_{false};
  std::atomic<bool> closing_{false};
  std::mutex mutex_;
  std::condition_variable published_;
  std::vector<std::thread> workers_;
};

}  // namespace strace
