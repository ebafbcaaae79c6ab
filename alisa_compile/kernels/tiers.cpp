// What tiers.py asks of the native side of a store's tiers.

#include "tiers.h"

namespace {

// Its op: the other calls name a state by number alone, and come from `ctypes`.
void tiers_open(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  auto state = std::make_shared<Tiers>(arguments);
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.states.emplace(state->number, state);
}

// `TierState.stage`: rows of the positions [first, end) to staging, of one (sequence, group) after the other.
void tiers_stage(StableIValue* stack, uint64_t, uint64_t) {
  constexpr int64_t kPiece = 256;  // positions that a thread copies at a time
  Arguments arguments(stack);
  const int64_t number = arguments.integer();
  Tensor pool = arguments.tensor();
  Tensor scales = arguments.optional_tensor();
  Tensor table = arguments.tensor();
  const int64_t layer = arguments.integer(), first = arguments.integer(), end = arguments.integer();

  const std::shared_ptr<Tiers> tiers = find_tiers(number);
  const Device device = tiers->device(pool, scales);
  tiers->drain();
  const int64_t groups = table.contiguous(4).size[2], lists = table.size[1] * groups, capacity = table.size[3];
  require(lists == tiers->batch * tiers->groups, "alisa: the table does not have the shape of the store");
  require(0 <= first && first < end && end <= capacity && lists * (end - first) <= tiers->staging_rows(),
          "alisa: so many positions do not fit staging");
  const int64_t count = end - first, pieces = (count + kPiece - 1) / kPiece;
  Tally tally;
  parallel(lists * pieces, lists * count * tiers->row_bytes(0), [&](int64_t unit) {
    const int64_t list = unit / pieces, begin = unit % pieces * kPiece, size = std::min(kPiece, count - begin);
    const int32_t* slots = table.data<int32_t>() + (layer * lists + list) * capacity + first + begin;
    Stage stage(*tiers, layer, tiers->staging(list * count + begin));
    int32_t away[kPiece];
    for (int64_t i = 0; i < size; ++i) {
      const int64_t position = first + begin + i;  // Python rebuilds the deleted ones
      away[i] = slots[i] < 0 && position >= tiers->deleted(layer) ? static_cast<int32_t>(position) : -1;
      for (int part = 0; part < tiers->parts() && slots[i] >= 0; ++part) {
        const int64_t bytes = tiers->row_bytes(part);
        std::memcpy(stage.staged(part, i), device.parts[part] + slots[i] * bytes, bytes);
      }
    }
    stage.fetch(tiers->region(layer, list / groups, list % groups), away, size);
    tally.add(stage);
  });
  tiers->note(tally.traffic, tally.failure);
}

// Hands over the rows of a layer that `kv_prefetch` has given slots to and that are deleted: `[4, K]`, of each its
// sequence, position, group and slot.
void tiers_pending(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor ticket = arguments.tensor();
  const int64_t layer = arguments.integer();
  const std::shared_ptr<Tiers> tiers = tiers_of(ticket);
  std::vector<Tiers::Entry>& entries = tiers->pending(layer).entries;
  const int64_t count = static_cast<int64_t>(entries.size());
  Tensor found = empty_like_rows(ticket, {4, count});
  auto* const out = found.data<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    out[i] = entries[i].region / tiers->groups - layer * tiers->batch;
    out[count + i] = entries[i].position;
    out[2 * count + i] = entries[i].region % tiers->groups;
    out[3 * count + i] = entries[i].slot;
  }
  entries.clear();
  stack[0] = result(std::move(found));
}

// Waits until nothing reads any more what these slots have held.
void tiers_settle(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor ticket = arguments.tensor();
  const int64_t layer = arguments.integer();
  const std::shared_ptr<Tiers> tiers = tiers_of(ticket);
  tiers->wait(tiers->pending(layer).after);
}

}  // namespace

// Waits for all jobs of a state. The message of a job that failed, valid until this thread asks again; or null.
extern "C" const char* alisa_tiers_drain(int64_t number) {
  static thread_local std::string message;
  try {
    find_tiers(number)->drain();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

// Waits for all jobs of a state and forgets a failure.
extern "C" const char* alisa_tiers_recover(int64_t number) {
  find_tiers(number)->recover();
  return nullptr;
}

// Ends a state: a job that runs ends first, those after it are dropped.
extern "C" const char* alisa_tiers_close(int64_t number) {
  std::shared_ptr<Tiers> state;
  Registry& all = registry();
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.states.find(number);
    if (found == all.states.end()) return nullptr;
    state = std::move(found->second);
    all.states.erase(found);
  }
  return nullptr;  // the state goes here, without the lock: freeing a tensor may enter Python, and Python this function
}

// Starts (1) or ends (0) the keeping of intervals.
extern "C" void alisa_tiers_record(int64_t on) { recording.store(on != 0, std::memory_order_relaxed); }

// Moves at most `room` of the kept intervals to `out [room, 6]`, the oldest first; how many those were.
extern "C" int64_t alisa_tiers_recorded(int64_t* out, int64_t room) {
  static_assert(sizeof(Interval) == 6 * sizeof(int64_t), "an interval is six integers");
  Intervals& all = intervals();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const int64_t count = std::min<int64_t>(room, all.kept.size());
  for (int64_t i = 0; i < count; ++i) std::memcpy(out + 6 * i, &all.kept[i], sizeof(Interval));
  all.kept.erase(all.kept.begin(), all.kept.begin() + count);
  return count;
}
