#include "core/lease.h"

#include <algorithm>
#include <chrono>

#include <fcntl.h>
#include <time.h>
#include <unistd.h>

namespace vai {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kPatience = std::chrono::seconds(2);  // far longer than a step while anybody streams
constexpr timespec kPause{0, 50'000};

}  // namespace

CoreLease::CoreLease(const std::string& path) : cores_(int(std::max(1L, sysconf(_SC_NPROCESSORS_ONLN)))) {
#if defined(F_OFD_SETLK)
  if (!path.empty()) file_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
#endif
}

CoreLease::~CoreLease() {
  if (file_ >= 0) close(file_);
}

bool CoreLease::lock(off_t first, off_t bytes, bool wanted) const {
#if defined(F_OFD_SETLK)
  struct flock range{};
  range.l_type = wanted ? F_WRLCK : F_UNLCK;
  range.l_whence = SEEK_SET;
  range.l_start = first;
  range.l_len = bytes;
  return fcntl(file_, F_OFD_SETLK, &range) == 0;
#else
  return first + bytes > 0 && wanted;
#endif
}

bool CoreLease::take_now(int count) {
  for (int first = 0; first + count <= cores_; first += count)
    if (lock(first, count, true)) {
      first_ = first;
      bytes_ = count;
      return true;
    }
  return false;
}

void CoreLease::take(int count) {
  if (file_ < 0) return;
  count = std::min(count, cores_);
  // The byte behind the cores is the turn: who waits for cores holds it, so that whoever gave some back waits behind.
  const off_t turn = cores_;
  const auto until = Clock::now() + kPatience;
  for (bool mine = false;;) {
    if (!mine) mine = lock(turn, 1, true);
    const bool done = mine && take_now(count);
    if (done || in_vain_ || Clock::now() > until) {
      if (mine) lock(turn, 1, false);
      in_vain_ = !done;
      return;
    }
    nanosleep(&kPause, nullptr);
  }
}

void CoreLease::give() {
  if (bytes_ > 0) lock(first_, bytes_, false);
  bytes_ = 0;
}

}  // namespace vai
