// CPU kernel of alisa::kv_wait; tiers.h says what it waits for.

#include "../tiers.h"

namespace {

void kv_wait(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor pool = arguments.tensor();
  Tensor ticket = arguments.tensor();
  Tensor anchor = arguments.tensor();
  const int64_t layer = arguments.integer();

  int64_t& job = ticket.contiguous(1).data<int64_t>()[layer];
  tiers_of(ticket)->wait(job);
  job = 0;
}

}  // namespace
