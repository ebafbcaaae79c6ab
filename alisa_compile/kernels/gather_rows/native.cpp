// CPU kernel of alisa::gather_rows; reference.py says what it must compute. scatter_rows uses `copy_runs` too.

#include "../native.h"

namespace {

int64_t slot_at(const Tensor& slots, int64_t i) {
  i *= slots.stride[0];  // a column of a residency table is strided
  return slots.type == Type::kInt32 ? slots.data<int32_t>()[i] : slots.data<int64_t>()[i];
}

// Copy between a pool and packed rows, one memcpy for each run of neighbouring slots.
void copy_runs(char* pool, char* packed, const Tensor& slots, int64_t pool_rows, int64_t row_bytes, bool to_pool) {
  constexpr int64_t kPart = 64;  // slots that a thread takes at a time
  const int64_t count = slots.size[0];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t slot = slot_at(slots, i);
    require(slot >= 0 && slot < pool_rows, "alisa: a slot is outside its pool");
  }
  parallel((count + kPart - 1) / kPart, count * row_bytes / 4, [&](int64_t part) {
    const int64_t end = std::min((part + 1) * kPart, count);
    for (int64_t i = part * kPart; i < end;) {
      const int64_t first = slot_at(slots, i);
      int64_t run = 1;
      while (i + run < end && slot_at(slots, i + run) == first + run) ++run;
      char* here = pool + first * row_bytes;
      char* there = packed + i * row_bytes;
      std::memcpy(to_pool ? here : there, to_pool ? there : here, run * row_bytes);
      i += run;
    }
  });
}

// Bytes of one row of a contiguous `[N, ...]` tensor.
int64_t row_bytes_of(const Tensor& rows) {
  int64_t bytes = bytes_of(rows.type);
  for (int64_t d = 1; d < rows.dim; ++d) bytes *= rows.size[d];
  return bytes;
}

void check_slots(const Tensor& slots) {
  require(slots.dim == 1, "alisa: slots have one dimension");
  require(slots.type == Type::kInt32 || slots.type == Type::kInt64, "alisa: slots are int32 or int64");
}

void gather_rows(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor pool = arguments.tensor();
  Tensor slots = arguments.tensor();
  pool.contiguous(pool.dim);
  check_slots(slots);
  std::vector<int64_t> sizes(pool.size, pool.size + pool.dim);
  sizes[0] = slots.size[0];
  Tensor packed = empty_like_rows(pool, sizes);
  copy_runs(pool.data<char>(), packed.data<char>(), slots, pool.size[0], row_bytes_of(pool), false);
  stack[0] = result(std::move(packed));
}

}  // namespace
