// CPU kernel of alisa::kv_prefetch; reference.py says what it must decide, tiers.h makes the copies.

#include "../tiers.h"

namespace {

// One (sequence, group) of a layer.
struct Quota {
  int32_t* place;  // [capacity]
  int32_t* owner;  // [slots]
  int64_t region, slots, capacity, tokens, below;
};

// Let rows enter one quota: appends those to fetch. Returns how many of the working set are not on the device after.
int64_t enter(const Quota& own, const int32_t* rows, int64_t count, std::vector<Tiers::Entry>& entries) {
  // By position: whether its row has to stay. Those that are not below do, and so do wanted ones.
  auto* const stays = scratch<uint8_t, 9>(own.capacity + 1);
  std::memset(stays, 0, own.below);
  std::memset(stays + own.below, 1, own.capacity + 1 - own.below);
  auto* const entering = scratch<int32_t, 10>(own.tokens);
  int64_t wanted = 0;
  bool ascending = true;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t position = rows[i];
    if (static_cast<uint64_t>(position) >= static_cast<uint64_t>(own.tokens)) continue;
    if (own.place[position] < 0 && stays[position] == 0) {
      ascending = ascending && (wanted == 0 || entering[wanted - 1] < position);
      entering[wanted++] = position;
    }
    stays[position] = 1;
  }
  if (!ascending) std::sort(entering, entering + wanted);

  const int64_t reserve = own.tokens < own.capacity && own.place[own.tokens] < 0 ? 1 : 0;
  const int64_t needed = wanted + reserve;
  if (needed == 0) return 0;
  auto* const slots = scratch<int32_t, 11>(needed);
  int64_t found = 0;
  // First the free ones; most often there are none, and the signs of all owners together say so.
  int32_t signs = 0;
  for (int64_t slot = 0; slot < own.slots; ++slot) signs |= own.owner[slot];
  for (int64_t slot = 0; signs < 0 && slot < own.slots && found < needed; ++slot) {
    if (own.owner[slot] < 0) slots[found++] = static_cast<int32_t>(slot);
  }
  for (int64_t slot = 0; slot < own.slots && found < needed; ++slot) {
    const int32_t position = own.owner[slot];
    if (position >= 0 && stays[position] == 0) slots[found++] = static_cast<int32_t>(slot);
  }

  const int64_t fit = std::max<int64_t>(0, std::min(wanted, found - reserve));
  int64_t missed = wanted - fit;
  // Where every slot is wanted, the coming token has to take one of them.
  for (int64_t slot = 0; slot < own.slots && found < fit + reserve; ++slot) {
    if (own.owner[slot] < 0 || own.owner[slot] >= own.below) continue;
    slots[found++] = static_cast<int32_t>(slot);
    ++missed;
  }
  const int64_t base = own.region * own.slots;
  for (int64_t i = 0; i < std::min(found, fit + reserve); ++i) {
    int32_t& owner = own.owner[slots[i]];
    if (owner >= 0) own.place[owner] = -1;
    owner = i < fit ? entering[i] : static_cast<int32_t>(own.tokens);
    own.place[owner] = static_cast<int32_t>(base + slots[i]);
    if (i < fit) entries.push_back({own.region, entering[i], base + slots[i]});
  }
  return missed;
}

void kv_prefetch(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor pool = arguments.tensor();
  Tensor scales = arguments.optional_tensor();
  Tensor table = arguments.tensor();
  Tensor length = arguments.tensor();
  Tensor rows = arguments.optional_tensor();
  Tensor counts = arguments.optional_tensor();
  Tensor ticket = arguments.tensor();
  const int64_t layer = arguments.integer();

  const std::shared_ptr<Tiers> tiers = tiers_of(ticket);
  const Device device = tiers->device(pool, scales);
  const int64_t tokens = length.contiguous(1).data<int64_t>()[layer];
  const int64_t groups = table.contiguous(4).size[2], lists = table.size[1] * groups, capacity = table.size[3];
  require(lists == tiers->batch * tiers->groups, "alisa: the table does not have the shape of the store");
  static thread_local std::vector<Tiers::Entry> entries;
  entries.clear();
  int64_t missed = 0;
  for (int64_t list = 0; list < lists; ++list) {
    const int64_t at = layer * lists + list, region = tiers->region(layer, list / groups, list % groups);
    const Quota own{table.data<int32_t>() + at * capacity, tiers->owner(region), region, tiers->quota, capacity, tokens,
                    tiers->below(layer)};
    int64_t count = rows && counts ? counts.contiguous(3).data<int32_t>()[at] : 0;
    const int32_t* chosen = nullptr;
    if (count > 0) {
      require(count <= rows.contiguous(4).size[3], "alisa: a working set is larger than its room");
      chosen = rows.data<int32_t>() + at * rows.size[3];
    }
    missed += enter(own, chosen, count, entries);
  }
  tiers->misses(layer) = missed;
  const int64_t deleted = tiers->deleted(layer);
  if (deleted > 0) {
    const auto gone = std::stable_partition(entries.begin(), entries.end(),
                                            [&](const Tiers::Entry& entry) { return entry.position >= deleted; });
    tiers->pending(layer) = {{gone, entries.end()}, ticket.contiguous(1).data<int64_t>()[layer]};
    entries.erase(gone, entries.end());
  }
  if (entries.empty()) return;
  Job& job = empty_job();
  tiers->up(job, device, layer, entries);
  const int64_t number = tiers->start(job);
  if (number > 0) ticket.data<int64_t>()[layer] = number;
}

}  // namespace
