// A lease on cores between processes that do not know each other, so that two thread pools do not spin against each other.
#pragma once

#include <string>

#include <sys/types.h>

namespace vai {

// Byte i of a file that all of them open stands for a core, and is locked while a step runs on it. The lock belongs to the
// open file: the kernel gives it back when its process ends, however it ends. Not thread-safe.
class CoreLease {
 public:
  // Without a usable file there is no lease, and `take` returns at once.
  explicit CoreLease(const std::string& path);
  ~CoreLease();
  CoreLease(const CoreLease&) = delete;
  CoreLease& operator=(const CoreLease&) = delete;

  // Waits until `count` cores (or as many as there are) are free, in turn with the others; not for ever: a holder that was
  // stopped costs everybody one wait, after which steps run without the lease until it is free again.
  void take(int count);
  void give();

 private:
  bool lock(off_t first, off_t bytes, bool wanted) const;
  bool take_now(int count);

  int file_ = -1;
  int cores_ = 1;
  off_t first_ = 0, bytes_ = 0;  // held now
  bool in_vain_ = false;         // the last wait was
};

}  // namespace vai
