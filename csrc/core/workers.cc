#include "core/workers.h"

#include <cfenv>
#include <climits>
#include <csignal>
#include <stdexcept>

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace vai {
namespace {

constexpr int kNice = 5;
// About 30 microseconds: longer than the skew between workers that both run, far shorter than a time slice. Past it the
// other worker has lost its core to somebody, and spinning would only keep it away for longer.
constexpr int kSpins = 1000;

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Until `word` is no longer `old`: spin for a while, then sleep in the kernel (std::atomic::wait is a futex).
void await(const std::atomic<int>& word, int old, int spins) {
  for (int i = 0; i < spins; ++i) {
    if (word.load(std::memory_order_acquire) != old) return;
    pause_briefly();
  }
  while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

}  // namespace

Workers::Workers(int count, const std::string& lease) : owner_(getpid()), lease_(lease) {
  // Signals belong to the interpreter's own threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    for (int i = 0; i < count; ++i) threads_.emplace_back([this, i] { serve(i); });
  } catch (...) {  // the machine gives no more threads
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    stop();
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Workers::~Workers() {
  if (getpid() != owner_) {  // a forked child has copies of the handles and none of the threads
    for (auto& thread : threads_) thread.detach();
    return;
  }
  stop();
}

void Workers::stop() {
  started_.store(INT_MIN, std::memory_order_release);
  started_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Workers::run(const std::function<void(int)>& task) {
  if (getpid() != owner_) throw std::runtime_error("the thread pool belongs to another process: it does not survive a fork");
  const std::lock_guard<std::mutex> lock(one_run_);
  lease_.take(count());
  task_ = &task;
  running_.store(count(), std::memory_order_relaxed);
  started_.store((started_.load(std::memory_order_relaxed) + 1) & INT_MAX, std::memory_order_release);
  started_.notify_all();
  for (int left = running_.load(std::memory_order_acquire); left != 0; left = running_.load(std::memory_order_acquire))
    running_.wait(left, std::memory_order_acquire);
  lease_.give();
}

bool Workers::barrier() {
  const int phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count()) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store((phase + 1) & INT_MAX, std::memory_order_release);
    phase_.notify_all();
    return true;
  }
  await(phase_, phase, kSpins);
  return false;
}

void Workers::serve(int worker) {
  const id_t self = id_t(syscall(SYS_gettid));
  const int nice = getpriority(PRIO_PROCESS, self);
  setpriority(PRIO_PROCESS, self, nice + kNice);  // may fail only upwards; then we stay where we are
  for (int seen = 0;;) {
    await(started_, seen, 0);
    seen = started_.load(std::memory_order_acquire);
    if (seen < 0) return;
    fesetenv(FE_DFL_ENV);  // rounding to nearest, and no flushing of subnormals whatever the process has set
    (*task_)(worker);
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_all();
  }
}

}  // namespace vai
