// The thread pool: made once, asleep between steps, meeting at a spin barrier between the operations of one.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include <sys/types.h>

#include "core/lease.h"

namespace vai {

// `count` threads at nice +5; the caller of `run` only waits, so that those who talk are never behind those who compute.
// `lease`: a file that all processes with such pools share, empty for none; cores are taken for each run.
class Workers {
 public:
  explicit Workers(int count, const std::string& lease = "");
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  int count() const { return int(threads_.size()); }

  // LinearArgs::ahead of what they multiply. 2,880 is nowhere the best and nowhere bad (docs/log.md).
  size_t ahead() const { return ahead_.load(std::memory_order_relaxed); }
  void set_ahead(size_t bytes) { ahead_.store(bytes, std::memory_order_relaxed); }

  // Runs task(0) .. task(count - 1) at once and returns when all are done. One run at a time; a second caller waits.
  // Throws std::runtime_error in a forked child, which has no threads.
  void run(const std::function<void(int)>& task);

  // Called by every worker of a run: returns when all have called it, true to the last of them.
  bool barrier();

 private:
  void serve(int worker);
  void stop();

  std::vector<std::thread> threads_;
  const std::function<void(int)>* task_ = nullptr;
  std::mutex one_run_;
  const pid_t owner_;
  CoreLease lease_;
  std::atomic<size_t> ahead_{2880};
  // Each on its own cache line: one is written while others spin on its neighbour.
  alignas(64) std::atomic<int> started_{0};  // runs so far; negative: stop
  alignas(64) std::atomic<int> running_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

}  // namespace vai
