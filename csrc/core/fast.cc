#include "core/fast.h"

namespace vai {

void linear_fast_portable(const LinearArgs&, int, int, uint8_t*);

static const Fast kPortable{"portable", linear_fast_portable};

const std::vector<const Fast*>& available_fasts() {
  static const std::vector<const Fast*> fasts{&kPortable};
  return fasts;
}

const std::vector<RefusedFast>& refused_fasts() {
  static const std::vector<RefusedFast> refused;
  return refused;
}

}  // namespace vai
