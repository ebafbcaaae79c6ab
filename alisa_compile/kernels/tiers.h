// Rows below the device: the native side of `TierState` in tiers.py, and the thread that copies rows.
//
// An op decides on the calling thread: which positions, which slots, every table. What it decides to copy is a job. Jobs
// run in order, so a job may reuse a slot that one before it has yet to read.

#pragma once
#include "gather_rows/native.cpp"
#include "kv_select/native.cpp"
#include "native.h"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <unordered_map>
#include <utility>

namespace {

// Fewer bytes than this are copied where they are asked for. Measured on an AMD EPYC with 2 cores: to hand a job over
// takes 4 us, until it is known to have ended 10 us; to copy 64 KiB in scattered rows of 4 KiB takes 8.5 us.
constexpr int64_t kInlineBytes = 1 << 16;

enum class Way { kDown, kUp, kLost, kThrough, kFetch };  // device to host and back; host to disk; device to disk and back

// Places in `traffic`, as in tiers.py.
enum Traffic { kDeviceToHost, kHostToDevice, kDiskWrite, kDiskRead, kStall, kDiskStall, kRowsMissed, kTrafficPlaces };

// For a timeline: how long copies of one way, one after the other, have taken, or an op has waited for a job. Times are
// those of Python's time.perf_counter_ns. Nothing is kept unless someone records: an op then only looks at `recording`.
struct Interval {
  int64_t begin, end, kind, bytes, layer, store;  // kind: a Way, or one of those below
};
constexpr int64_t kHostWait = 5, kDiskWait = 6;
static_assert(kHostWait == static_cast<int64_t>(Way::kFetch) + 1, "the kinds of tiers.py");

std::atomic<bool> recording{false};

// Of all stores. Never destroyed: threads may still run while the process ends.
struct Intervals {
  std::mutex mutex;
  std::deque<Interval> kept;

  void add(const Interval& interval) {
    const std::lock_guard<std::mutex> lock(mutex);
    kept.push_back(interval);
  }
};

Intervals& intervals() {
  static Intervals* const all = new Intervals;
  return *all;
}

int64_t nanoseconds(std::chrono::steady_clock::time_point time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
}

// Copies to make in this order, neighbours merged.
struct Job {
  struct Step {
    Way way;
    char* to;  // in memory; on disk: see `first`
    const char* from;
    int64_t bytes;
    int64_t offset;        // in the file
    size_t first, pieces;  // of `memory`
  };
  std::vector<Step> steps;
  std::vector<iovec> memory;
  int64_t bytes = 0;
  int64_t layer = 0;  // that asked for them
  bool disk = false;

  void clear() {
    steps.clear();
    memory.clear();
    bytes = 0;
    disk = false;
  }
  void copy(Way way, char* to, const char* from, int64_t count) {
    bytes += count;
    if (!steps.empty()) {
      Step& last = steps.back();
      if (last.way == way && last.to + last.bytes == to && last.from + last.bytes == from) {
        last.bytes += count;
        return;
      }
    }
    steps.push_back({way, to, from, count, 0, 0, 0});
  }
  void access(Way way, int64_t offset, char* address, int64_t count) {
    bytes += count;
    disk = true;
    if (steps.empty() || steps.back().way != way || steps.back().offset + steps.back().bytes != offset) {
      steps.push_back({way, nullptr, nullptr, 0, offset, memory.size(), 0});
    }
    Step& step = steps.back();
    step.bytes += count;
    if (step.pieces > 0 && static_cast<char*>(memory.back().iov_base) + memory.back().iov_len == address) {
      memory.back().iov_len += count;
    } else {
      memory.push_back({address, static_cast<size_t>(count)});
      ++step.pieces;
    }
  }
};

// Read or write all pieces from `offset` on; what went wrong, or "".
std::string access_file(int file, bool write, iovec* piece, size_t pieces, int64_t offset) {
  constexpr size_t kPieces = 1024;  // IOV_MAX
  while (pieces > 0) {
    const int count = static_cast<int>(std::min(pieces, kPieces));
    ssize_t done = write ? pwritev(file, piece, count, offset) : preadv(file, piece, count, offset);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) {
      const std::string reason = done < 0 ? std::generic_category().message(errno) : "the file is shorter than it was made";
      return std::string("alisa: rows on disk could not be ") + (write ? "written: " : "read: ") + reason;
    }
    offset += done;
    for (; pieces > 0 && static_cast<size_t>(done) >= piece->iov_len; ++piece, --pieces) done -= piece->iov_len;
    if (pieces > 0) {
      piece->iov_base = static_cast<char*>(piece->iov_base) + done;
      piece->iov_len -= done;
    }
  }
  return "";
}

// Memory of the device that an op was given: rows, and scales if the store has them.
struct Device {
  char* parts[2];
};

// The job that an op fills: its memory stays with the thread, unless it is handed over.
Job& empty_job() {
  static thread_local Job job;
  job.clear();
  return job;
}

// One store's tiers. The calling thread and the worker share what `mutex_` guards, the atomics, and `traffic`, in which
// each has entries of its own while the other may write; every other member belongs to the calling thread.
class Tiers {
 public:
  explicit Tiers(Arguments& arguments)
      : number(arguments.integer()), pool_(arguments.tensor()), scales_(arguments.optional_tensor()), host_(arguments.tensor()),
        host_scales_(arguments.optional_tensor()), owner_(arguments.tensor()), below_(arguments.tensor()),
        on_disk_(arguments.tensor()), home_(arguments.tensor()), traffic_(arguments.tensor()),
        misses_(arguments.tensor()), staging_(arguments.tensor()), staging_scales_(arguments.optional_tensor()),
        deleted_(arguments.optional_tensor()), saved_(arguments.optional_tensor()), groups(arguments.integer()),
        quota(arguments.integer()), max_rows(arguments.integer()) {
    const int64_t file = arguments.integer();
    disk_positions_ = arguments.integer();
    most_deleted_ = arguments.integer();
    if (deleted_) pending_.resize(below_.size[0]);
    require(traffic_.size[0] == kTrafficPlaces, "alisa: traffic has the wrong number of places");
    require(static_cast<bool>(scales_) == static_cast<bool>(host_scales_) &&
                static_cast<bool>(scales_) == static_cast<bool>(staging_scales_),
            "alisa: only one tier has scales");
    batch = home_.size[0];
    parts_ = scales_ ? 2 : 1;
    bytes_[0] = row_bytes_of(host_.contiguous(4));
    bytes_[1] = scales_ ? row_bytes_of(host_scales_.contiguous(3)) : 0;
    ring_ = host_.size[0] / (below_.size[0] * batch * groups);
    require(owner_.size[0] == below_.size[0] * batch * groups * quota && pool_.size[0] == owner_.size[0],
            "alisa: the device pool does not consist of quotas");
    require(row_bytes_of(staging_.contiguous(4)) == bytes_[0] &&
                (!scales_ || row_bytes_of(staging_scales_.contiguous(3)) == bytes_[1]),
            "alisa: staging does not hold rows of the store");
    if (file >= 0) {
      // Of our own: the number may name another file once Python has closed it.
      disk_ = fcntl(static_cast<int>(file), F_DUPFD_CLOEXEC, 0);
      require(disk_ >= 0, "alisa: the file of the disk tier cannot be used");
    }
  }
  Tiers(const Tiers&) = delete;
  Tiers& operator=(const Tiers&) = delete;
  ~Tiers() {
    if (worker_.joinable()) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        closing_ = true;
      }
      wake_.notify_one();
      worker_.join();
    }
    if (disk_ >= 0) close(disk_);
  }

  // -------------------------------------------------------------------------------------- where rows are
  int64_t region(int64_t layer, int64_t sequence, int64_t group) const {
    return (layer * batch + home_.data<int64_t>()[sequence]) * groups + group;
  }
  int32_t* owner(int64_t region) const { return owner_.data<int32_t>() + region * quota; }
  int64_t& below(int64_t layer) const { return below_.data<int64_t>()[layer]; }
  int64_t& on_disk(int64_t layer) const { return on_disk_.data<int64_t>()[layer]; }
  // So many first positions of a layer are on no tier.
  int64_t deleted(int64_t layer) const { return deleted_ ? deleted_.data<int64_t>()[layer] : 0; }
  int64_t& misses(int64_t layer) const { return misses_.data<int64_t>()[layer]; }
  int64_t staging_rows() const { return staging_.size[0]; }
  Device staging(int64_t row) const {
    return {{staging_.data<char>() + row * bytes_[0],
             staging_scales_ ? staging_scales_.data<char>() + row * bytes_[1] : nullptr}};
  }
  int parts() const { return parts_; }  // 2 with scales
  int64_t row_bytes(int part) const { return bytes_[part]; }
  // A row below that is on the host, or its scales.
  const char* on_host(int part, int64_t region, int64_t position) const {
    return host(part) + (region * ring_ + position % ring_) * bytes_[part];
  }

  // The memory of an op's arguments. A compiler may have put copies in place of the store's: no later op can wait for
  // those, so everything else ends first, and `start` copies at once.
  Device device(const Tensor& pool, const Tensor& scales) {
    throw_failure();
    require(static_cast<bool>(scales) == static_cast<bool>(scales_), "alisa: only one tier has scales");
    require(row_bytes_of(pool.contiguous(4)) == bytes_[0] && pool.size[0] == pool_.size[0] &&
                (!scales || row_bytes_of(scales.contiguous(3)) == bytes_[1]),
            "alisa: the rows do not have the shape of the store");
    copies_ = pool.data<char>() != pool_.data<char>() || (scales && scales.data<char>() != scales_.data<char>());
    if (copies_) drain();
    return {{pool.data<char>(), scales ? scales.data<char>() : nullptr}};
  }

  // Write the rows of the positions [below, end) of a layer, and note it; where the plan deletes rows, those that the
  // host has no room for, the oldest first. table: `[B, G, capacity]` of the layer.
  void down(Job& job, const Device& device, const int32_t* table, int64_t capacity, int64_t layer, int64_t end) {
    const int64_t gone = may_delete(layer, end - ring_);
    require(end - ring_ <= gone || gone >= most_deleted_, "alisa: rows were to be deleted whose inputs were not saved");
    require(disk_ >= 0 || end - ring_ <= gone, "alisa: the plan has no disk, and the host is full");
    job.layer = layer;
    int64_t &below = this->below(layer), &on_disk = this->on_disk(layer);
    auto each = [&](int64_t first, int64_t stop, const auto& body) {
      for (int64_t list = 0; list < batch * groups; ++list) {
        const int64_t region = this->region(layer, list / groups, list % groups);
        for (int64_t position = first; position < stop; ++position) body(region, position, table + list * capacity);
      }
    };
    each(below, end, [&](int64_t, int64_t position, const int32_t* slots) {
      require(slots[position] >= 0 && slots[position] < pool_.size[0], "alisa: a row to write down is not on the device");
    });
    if (gone > on_disk) on_disk = deleted_.data<int64_t>()[layer] = gone;
    below = std::max(below, gone);  // those deleted at once are never written
    while (below < end) {
      const int64_t stop = std::min(end, below + std::max<int64_t>(1, ring_));
      if (ring_ == 0) {
        each(below, stop, [&](int64_t region, int64_t position, const int32_t* slots) {
          access(job, Way::kThrough, region, position, device.parts, slots[position]);
        });
        on_disk = stop;
      } else {
        if (stop - ring_ > on_disk) {
          char* host[2] = {this->host(0), this->host(1)};
          each(on_disk, stop - ring_, [&](int64_t region, int64_t position, const int32_t*) {
            access(job, Way::kLost, region, position, host, region * ring_ + position % ring_);
          });
          on_disk = stop - ring_;
        }
        for (int part = 0; part < parts_; ++part) {
          each(below, stop, [&](int64_t region, int64_t position, const int32_t* slots) {
            job.copy(Way::kDown, host(part) + (region * ring_ + position % ring_) * bytes_[part],
                     device.parts[part] + slots[position] * bytes_[part], bytes_[part]);
          });
        }
      }
      below = stop;
    }
  }

  struct Entry {
    int64_t region, position, slot;
  };

  // Rows of a layer that have slots and are deleted, so that they cannot be fetched.
  struct Pending {
    std::vector<Entry> entries;
    int64_t after = 0;  // the job that may still read what is in their slots
  };
  Pending& pending(int64_t layer) {
    require(static_cast<bool>(deleted_), "alisa: this store deletes no rows");
    return pending_[layer];
  }

  // Fetch rows from below into slots of the device.
  void up(Job& job, const Device& device, int64_t layer, const std::vector<Entry>& entries) const {
    job.layer = layer;
    const int64_t on_disk = this->on_disk(layer);
    for (int part = 0; part < parts_; ++part) {
      for (const Entry& entry : entries) {
        if (entry.position < on_disk) continue;
        job.copy(Way::kUp, device.parts[part] + entry.slot * bytes_[part],
                 on_host(part, entry.region, entry.position), bytes_[part]);
      }
    }
    for (const Entry& entry : entries) {
      if (entry.position < on_disk) access(job, Way::kFetch, entry.region, entry.position, device.parts, entry.slot);
    }
  }

  // ---------------------------------------------------------------------------------------------------- jobs
  // Run a job or hand it over: its number, or 0 if it has ended. Leaves an empty job.
  int64_t start(Job& job) {
    if (job.steps.empty()) return 0;
    const bool idle = completed_.load(std::memory_order_acquire) == started_;
    if (copies_ || (idle && !job.disk && job.bytes < kInlineBytes)) {
      const std::string failure = execute(job, traffic_.data<int64_t>());
      job.clear();
      if (!failure.empty()) fail(failure);
      throw_failure();
      return 0;
    }
    if (!worker_.joinable()) {
      try {
        worker_ = std::thread(&Tiers::work, this);
      } catch (const std::system_error&) {
        fail("alisa: the thread that moves rows could not be started");
        throw_failure();
      }
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      jobs_.push_back(std::move(job));
    }
    wake_.notify_one();
    job = Job();
    return ++started_;
  }

  // Make the copies of a job, and count their bytes in `traffic`; what went wrong, or "".
  std::string execute(Job& job, int64_t* traffic) const {
    const size_t count = job.steps.size();
    if (!recording.load(std::memory_order_relaxed)) return copy(job, 0, count, traffic);
    std::string failure;
    for (size_t first = 0, last; first < count && failure.empty(); first = last) {
      const Way way = job.steps[first].way;
      for (last = first + 1; last < count && job.steps[last].way == way;) ++last;
      const int64_t& copied = traffic[way == Way::kDown    ? kDeviceToHost
                                      : way == Way::kUp    ? kHostToDevice
                                      : way == Way::kFetch ? kDiskRead
                                                           : kDiskWrite];
      const int64_t before = copied;
      const auto begin = std::chrono::steady_clock::now();
      failure = copy(job, first, last, traffic);
      const auto end = std::chrono::steady_clock::now();
      intervals().add({nanoseconds(begin), nanoseconds(end), static_cast<int64_t>(way), copied - before, job.layer, number});
    }
    return failure;
  }

  // The copies [first, last) of a job.
  std::string copy(Job& job, size_t first, size_t last, int64_t* traffic) const {
    for (size_t i = first; i < last; ++i) {
      const Job::Step& step = job.steps[i];
      if (step.way == Way::kDown || step.way == Way::kUp) {
        std::memcpy(step.to, step.from, step.bytes);
      } else {
        const std::string failure = access_file(disk_, step.way != Way::kFetch, job.memory.data() + step.first, step.pieces,
                                                step.offset);
        if (!failure.empty()) return failure;
        traffic[step.way == Way::kFetch ? kDiskRead : kDiskWrite] += step.bytes;
      }
      if (step.way == Way::kDown || step.way == Way::kThrough) traffic[kDeviceToHost] += step.bytes;
      if (step.way == Way::kUp || step.way == Way::kFetch) traffic[kHostToDevice] += step.bytes;
    }
    return "";
  }

  // Count what threads have copied that have ended, while no job runs; throws what went wrong unless that is "".
  void note(const int64_t* traffic, const std::string& failure) {
    for (int place = 0; place < kTrafficPlaces; ++place) traffic_.data<int64_t>()[place] += traffic[place];
    if (!failure.empty()) fail(failure);
    throw_failure();
  }

  // Until a job and all before it have ended; adds the time to `traffic`.
  void wait(int64_t number) {
    if (completed_.load(std::memory_order_acquire) < number) {
      int64_t blocked = 0, on_disk = 0;
      std::unique_lock<std::mutex> lock(mutex_);
      auto before = std::chrono::steady_clock::now();
      while (completed_.load(std::memory_order_relaxed) < number) {
        const int64_t ended = completed_.load(std::memory_order_relaxed);
        const bool disk = jobs_.front().disk;  // it stays there until it has ended
        const int64_t layer = jobs_.front().layer;
        done_.wait(lock, [&] { return completed_.load(std::memory_order_relaxed) > ended; });
        const auto now = std::chrono::steady_clock::now();
        const int64_t passed = std::chrono::duration_cast<std::chrono::nanoseconds>(now - before).count();
        if (recording.load(std::memory_order_relaxed)) {
          intervals().add({nanoseconds(before), nanoseconds(now), disk ? kDiskWait : kHostWait, 0, layer, number});
        }
        before = now;
        blocked += passed;
        if (disk) on_disk += passed;
      }
      traffic_.data<int64_t>()[kStall] += blocked;
      traffic_.data<int64_t>()[kDiskStall] += on_disk;
    }
    throw_failure();
  }

  // Until all jobs have ended, however they did.
  void settle() {
    if (completed_.load(std::memory_order_acquire) == started_) return;
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return completed_.load(std::memory_order_relaxed) == started_; });
  }
  void drain() {
    settle();
    throw_failure();
  }
  void recover() {
    settle();
    const std::lock_guard<std::mutex> lock(mutex_);
    failure_.clear();
    failed_.store(false, std::memory_order_relaxed);
  }
  void throw_failure() {
    if (!failed_.load(std::memory_order_acquire)) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    throw std::runtime_error(failure_);
  }

  int64_t batch = 0;
  const int64_t number;  // of the state, as in the ticket

 private:
  char* host(int part) const { return part == 0 ? host_.data<char>() : host_scales_.data<char>(); }

  void access(Job& job, Way way, int64_t region, int64_t position, char* const* memory, int64_t slot) const {
    // The first ones are deleted before they could come to the disk.
    int64_t offset = (region * disk_positions_ + position - most_deleted_) * (bytes_[0] + bytes_[1]);
    for (int part = 0; part < parts_; ++part) {
      job.access(way, offset, memory[part] + slot * bytes_[part], bytes_[part]);
      offset += bytes_[part];
    }
  }

  // How many of the first `end` positions can be had again without their K and V: `HiddenRows.may_delete`.
  int64_t may_delete(int64_t layer, int64_t end) const {
    return deleted_ ? std::min({end, most_deleted_, saved_.data<int64_t>()[layer]}) : std::min<int64_t>(end, 0);
  }

  void fail(const std::string& failure) {
    const std::lock_guard<std::mutex> lock(mutex_);
    failure_ = failure;
    failed_.store(true, std::memory_order_release);
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return closing_ || !jobs_.empty(); });
      if (closing_) return;  // nobody can ask for what is left
      Job& job = jobs_.front();
      if (!failed_.load(std::memory_order_relaxed)) {  // after a failure nothing below the device is sure
        lock.unlock();
        const std::string failure = execute(job, traffic_.data<int64_t>());
        if (!failure.empty()) fail(failure);
        lock.lock();
      }
      jobs_.pop_front();
      completed_.fetch_add(1, std::memory_order_release);
      done_.notify_all();
    }
  }

  // The state keeps these alive: a job may still copy when Python has let go of them.
  Tensor pool_, scales_, host_, host_scales_, owner_, below_, on_disk_, home_, traffic_, misses_, staging_,
      staging_scales_, deleted_, saved_;

 public:
  const int64_t groups, quota, max_rows;

 private:
  int64_t ring_ = 0, disk_positions_ = 0, most_deleted_ = 0;
  std::vector<Pending> pending_;  // by layer
  int64_t bytes_[2] = {0, 0};  // of a row, of its scales
  int parts_ = 1;
  int disk_ = -1;
  bool copies_ = false;   // the op's device memory is not the store's
  int64_t started_ = 0;  // jobs handed over

  std::atomic<int64_t> completed_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::deque<Job> jobs_;  // the first one is being run
  std::string failure_;
  bool closing_ = false;
  std::thread worker_;
};

// Memory on the device through which a thread takes rows from below that a kernel reads there and then. No job may run.
class Stage {
 public:
  Stage(const Tiers& tiers, int64_t layer, const Device& memory) : tiers_(tiers), layer_(layer), memory_(memory) {}

  // Where a row is before `fetch`; one on disk has memory of any content.
  const char* source(int part, int64_t region, int64_t position) const {
    if (position < tiers_.on_disk(layer_) || position >= tiers_.below(layer_)) return staged(part, 0);
    return tiers_.on_host(part, region, position);
  }
  // Where `fetch` puts the i-th row.
  char* staged(int part, int64_t i) const { return memory_.parts[part] + i * tiers_.row_bytes(part); }

  // Copy the i-th row of a region from below for each i with positions[i] >= 0; whether that went well.
  bool fetch(int64_t region, const int32_t* positions, int64_t count) {
    entries_.clear();
    for (int64_t i = 0; i < count; ++i) {
      if (positions[i] < 0) continue;
      if (positions[i] < tiers_.deleted(layer_) || positions[i] >= tiers_.below(layer_)) {
        failure = "alisa: a row is on no tier";
        return false;
      }
      entries_.push_back({region, positions[i], i});
    }
    if (entries_.empty()) return true;
    Job& job = empty_job();
    tiers_.up(job, memory_, layer_, entries_);
    failure = tiers_.execute(job, traffic);
    return failure.empty();
  }

  int64_t traffic[kTrafficPlaces] = {};
  std::string failure;

 private:
  const Tiers& tiers_;
  const int64_t layer_;
  const Device memory_;
  std::vector<Tiers::Entry> entries_;
};

// What the stages of several threads have done.
struct Tally {
  void add(const Stage& stage) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (int place = 0; place < kTrafficPlaces; ++place) traffic[place] += stage.traffic[place];
    if (failure.empty()) failure = stage.failure;
  }
  std::mutex mutex;
  int64_t traffic[kTrafficPlaces] = {};
  std::string failure;
};

// By number. Never destroyed: threads may still run while the process ends.
struct Registry {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<Tiers>> states;
};

Registry& registry() {
  static Registry* const all = new Registry;
  return *all;
}

std::shared_ptr<Tiers> find_tiers(int64_t number) {
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.states.find(number);
  require(found != all.states.end(), "alisa: the ticket names no open store");
  return found->second;
}

// `ticket [L + 1]`: each layer's latest job, and the number of the store.
std::shared_ptr<Tiers> tiers_of(const Tensor& ticket) {
  return find_tiers(ticket.contiguous(1).data<int64_t>()[ticket.size[0] - 1]);
}

}  // namespace
