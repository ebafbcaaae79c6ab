// What tiers.py asks of the native side of a store's tiers.

#include "tiers.h"

namespace {

// Its op: the other calls name a state by number alone, and come from `ctypes`.
void tiers_open(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const int64_t number = arguments.integer();
  auto state = std::make_shared<Tiers>(arguments);
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.states.emplace(number, std::move(state));
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
