// CPU kernel of alisa::scatter_rows; reference.py says what it must compute.

#include "../native.h"

namespace {

void scatter_rows(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor pool = arguments.tensor();
  Tensor slots = arguments.tensor();
  Tensor rows = arguments.tensor();
  pool.contiguous(pool.dim);
  rows.contiguous(pool.dim);
  check_slots(slots);
  require(rows.type == pool.type && rows.size[0] == slots.size[0] && row_bytes_of(rows) == row_bytes_of(pool),
          "alisa: the packed rows do not have the shape of the pool");
  copy_runs(pool.data<char>(), rows.data<char>(), slots, pool.size[0], row_bytes_of(pool), true);
}

}  // namespace
