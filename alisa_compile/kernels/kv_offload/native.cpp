// CPU kernel of alisa::kv_offload; reference.py says what it must decide, tiers.h makes the copies.

#include "../tiers.h"

namespace {

// `first_recent` of tiers.py.
int64_t first_recent(int64_t tokens, int64_t quota, const std::string& spec, int64_t max_rows) {
  const int64_t context = tokens + 1;
  if (context <= quota) return 0;
  if (spec.empty()) return std::min(tokens, context - quota);
  Selection policy = selection_of(spec);
  if (max_rows != 0) policy.max_rows = max_rows;
  return std::min(tokens, context - quota + policy.dynamic_rows(context));
}

void kv_offload(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor pool = arguments.tensor();
  Tensor scales = arguments.optional_tensor();
  Tensor table = arguments.tensor();
  Tensor length = arguments.tensor();
  Tensor ticket = arguments.tensor();
  const int64_t layer = arguments.integer();
  const std::string spec = arguments.string();

  const std::shared_ptr<Tiers> tiers = tiers_of(ticket);
  const Device device = tiers->device(pool, scales);
  const int64_t tokens = length.contiguous(1).data<int64_t>()[layer];
  const int64_t end = first_recent(tokens, tiers->quota, spec, tiers->max_rows);
  if (tiers->below(layer) >= end) return;
  const int64_t lists = table.contiguous(4).size[1] * table.size[2], capacity = table.size[3];
  Job& job = empty_job();
  tiers->down(job, device, table.data<int32_t>() + layer * lists * capacity, capacity, layer, end);
  const int64_t number = tiers->start(job);
  if (number > 0) ticket.data<int64_t>()[layer] = number;
}

}  // namespace
