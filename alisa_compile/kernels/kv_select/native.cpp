// CPU kernel of alisa::kv_select and alisa::kv_seed; reference.py says what it must compute.

#include "../native.h"

namespace {

constexpr int64_t kSparseBlock = 16;  // SPARSE_BLOCK of selection.py

// `SelectionSpec` of selection.py: the same numbers, from the same string.
struct Selection {
  struct Share {
    int64_t numerator, denominator;
    // floor(length * share + 1/2)
    int64_t of(int64_t length) const {
      __extension__ typedef __int128 Wide;
      return static_cast<int64_t>((2 * static_cast<Wide>(numerator) * length + denominator) /
                                  (2 * static_cast<Wide>(denominator)));
    }
    int64_t floor_of(int64_t length) const {
      __extension__ typedef __int128 Wide;
      return static_cast<int64_t>(static_cast<Wide>(numerator) * length / denominator);
    }
  };
  enum class Rank { kDecay, kRing, kSum, kStride, kHash };
  Share local{0, 1}, dynamic{0, 1};
  Rank rank = Rank::kDecay;
  int64_t window = 0, sinks = 0, refresh = 0, max_rows = 0;

  explicit Selection(const std::string& text) {
    for (size_t begin = 0; begin < text.size();) {
      const size_t end = std::min(text.find(',', begin), text.size());
      const size_t equals = text.find('=', begin);
      require(equals < end, "alisa: a malformed selection");
      const std::string name = text.substr(begin, equals - begin), value = text.substr(equals + 1, end - equals - 1);
      if (name == "local") local = share(value);
      else if (name == "dynamic") dynamic = share(value);
      else if (name == "rank") rank = rank_of(value);
      else if (name == "window") window = std::stoll(value);
      else if (name == "sinks") sinks = std::stoll(value);
      else if (name == "refresh") refresh = std::stoll(value);
      else if (name == "max_rows") max_rows = std::stoll(value);
      else throw std::runtime_error("alisa: unknown field of a selection: " + name);
      begin = end + 1;
    }
  }
  int64_t local_rows(int64_t length) const {
    int64_t rows = local.of(length);
    if (max_rows != 0) rows = std::min(rows, local_cap());
    return std::min(std::max<int64_t>(rows, 1), length);
  }
  int64_t dynamic_rows(int64_t length) const {
    if (dynamic.numerator == 0) return 0;
    // On a stride: the positions before the current one where floor(j * share) steps up.
    int64_t rows = rank != Rank::kStride ? std::max<int64_t>(dynamic.of(length), 1)
                   : length < 2          ? 0
                                         : dynamic.floor_of(length - 2) + 1;
    if (max_rows != 0) rows = std::min(rows, max_rows - local_cap());
    return std::min(rows, length - local_rows(length));
  }
  int64_t decay_exponent(int64_t length) const { return length % (16 * window); }
  double decay_power(int64_t exponent) const {
    return std::pow(1 - 1 / static_cast<double>(window), static_cast<double>(exponent));
  }
  bool is_refresh_step(int64_t step, int64_t layer, int64_t new_tokens) const {
    return refresh > 0 && (step + layer) / refresh > (step + layer - new_tokens) / refresh;
  }
  bool on_stride(int64_t position) const {
    __extension__ typedef __int128 Wide;
    return static_cast<Wide>(position) * dynamic.numerator % dynamic.denominator < dynamic.numerator;
  }

 private:
  static Rank rank_of(const std::string& name) {
    const char* names[] = {"decay", "ring", "sum", "stride", "hash"};
    for (int i = 0; i < 5; ++i) {
      if (name == names[i]) return static_cast<Rank>(i);
    }
    throw std::runtime_error("alisa: unknown rank of a selection: " + name);
  }
  static Share share(const std::string& text) {
    const size_t slash = text.find('/');
    return {std::stoll(text), slash == std::string::npos ? 1 : std::stoll(text.substr(slash + 1))};
  }
  // The locals' part of max_rows, in the proportion local / (local + dynamic).
  int64_t local_cap() const {
    __extension__ typedef __int128 Wide;
    const Wide own = static_cast<Wide>(local.numerator) * dynamic.denominator;
    const Wide all = own + static_cast<Wide>(dynamic.numerator) * local.denominator;
    return std::max<int64_t>(1, static_cast<int64_t>((2 * own * max_rows + all) / (2 * all)));
  }
};

const Selection& selection_of(const std::string& text) {
  static thread_local std::string last;
  static thread_local Selection parsed("");
  if (text != last) {
    parsed = Selection(text);
    last = text;
  }
  return parsed;
}

using Rank = Selection::Rank;

struct SelectCall {
  Tensor &scores, &rows, &counts, &mass, &valid;
  int64_t layer, tokens, origin;
  const Selection& policy;
};

// A score and its position as one integer: larger score first, then the larger position. NaN counts as the largest
// score, as torch sorts it.
template <class Score>
struct Ranked {
  using Bits = std::conditional_t<sizeof(Score) == 4, uint32_t, uint64_t>;
  __extension__ typedef unsigned __int128 Wide;
  using Key = std::conditional_t<sizeof(Score) == 4, uint64_t, Wide>;
  static Key key(Score score, int64_t position) {
    constexpr int kBits = 8 * sizeof(Bits);
    Bits bits = bit_cast<Bits>(score);
    constexpr Bits kSign = Bits(1) << (kBits - 1);
    constexpr Bits kInfinity = sizeof(Score) == 4 ? Bits(0x7f800000u) : static_cast<Bits>(0x7ff0000000000000ull);
    if ((bits & ~kSign) > kInfinity) {
      bits = ~Bits(0);
    } else if (bits == kSign) {
      bits = kSign;  // -0 ranks as 0
    } else {
      bits = bits & kSign ? ~bits : bits | kSign;
    }
    return Key(bits) << 32 | Key(position);
  }
};

// One (sequence, group): its state and the number of its real tokens.
template <class Score>
struct Ranks {
  Score* state;  // [ring, capacity]
  int64_t ring, capacity, real_tokens;
};

// 24 pseudo-random bits for each (rank, clock).
inline uint32_t hash_of(uint32_t rank, uint32_t clock) {
  uint32_t mixed = rank * 2654435761u + clock * 2246822519u;
  mixed = (mixed ^ (mixed >> 15)) * 3266489917u;
  return (mixed ^ (mixed >> 13)) >> 8;
}

// The ranking score of positions [0, tokens); `valid` is null or says which of them are real.
template <class Score>
const Score* ranking(const Ranks<Score>& own, const bool* valid, int64_t tokens, const Selection& policy) {
  if (policy.rank == Rank::kDecay || policy.rank == Rank::kSum) return own.state;
  if (policy.rank != Rank::kRing) {
    Score* order = scratch<Score, 5>(2 * tokens);
    const auto clock = static_cast<uint32_t>(own.real_tokens);
    for (int64_t c = 0, rank = 0; c < tokens; ++c) {
      order[c] = policy.rank == Rank::kStride
                     ? static_cast<Score>(policy.on_stride(rank))
                     : static_cast<Score>(hash_of(static_cast<uint32_t>(rank), clock));
      rank += valid == nullptr || valid[c] ? 1 : 0;
    }
    return order;
  }
  Score* total = scratch<Score, 5>(2 * tokens);
  Score* block = total + tokens;
  std::fill(total, total + tokens, Score(0));
  const int64_t window = policy.local_rows(own.real_tokens + 1);
  // Sums of 16 ring rows, then the sum of those: the order in which torch adds them.
  for (int64_t first = 0; first < own.ring; first += 16) {
    bool any = false;
    for (int64_t slot = first; slot < std::min(first + 16, own.ring); ++slot) {
      int64_t age = (own.real_tokens - 1 - slot) % own.ring;
      if (age < 0) age += own.ring;
      if (age >= window || age >= own.real_tokens) continue;
      const Score* row = own.state + slot * own.capacity;
      for (int64_t c = 0; c < tokens; ++c) block[c] = any ? block[c] + row[c] : row[c];
      any = true;
    }
    for (int64_t c = 0; any && c < tokens; ++c) total[c] += block[c];
  }
  return total;
}

// `own.state` is changed by a policy that drops rows for good: their score becomes -inf.
template <class Score>
int32_t choose(const Ranks<Score>& own, const bool* valid, int64_t tokens, const Selection& policy, int32_t* rows,
               int64_t width) {
  const int64_t length = own.real_tokens + 1;  // the coming token counts; padding is no context
  const int64_t local = policy.local_rows(length), dynamic = policy.dynamic_rows(length);
  const int64_t sinks = std::min(dynamic, policy.sinks), ranked = dynamic - sinks;
  // Ranks of real tokens: sinks are [0, sinks), locals are [length - local, length), candidates lie between.
  const int64_t first_local = length - local;
  using Key = typename Ranked<Score>::Key;
  Key* keys = scratch<Key, 6>(tokens + 1);
  int64_t candidates = 0;
  const bool drops = policy.rank == Rank::kSum;
  constexpr Score kDropped = -std::numeric_limits<Score>::infinity();
  if (ranked > 0) {
    const Score* score = ranking(own, valid, tokens, policy);
    if (valid == nullptr && !drops) {
      for (int64_t c = sinks; c < first_local; ++c) keys[c - sinks] = Ranked<Score>::key(score[c], c);
      candidates = first_local - sinks;
    } else {
      int64_t rank = 0;
      for (int64_t c = 0; c < tokens && rank < first_local; ++c) {
        if (valid != nullptr && !valid[c]) continue;
        if (rank++ >= sinks && !(drops && score[c] == kDropped)) keys[candidates++] = Ranked<Score>::key(score[c], c);
      }
    }
  }
  // `keys` is in order of position, so a scan after the selection finds the chosen ones ascending, without a sort.
  Key threshold = 0;
  if (ranked > 0 && ranked < candidates) {
    Key* sorted = scratch<Key, 7>(candidates);
    std::copy(keys, keys + candidates, sorted);
    Key* place = sorted + (candidates - ranked);
    std::nth_element(sorted, place, sorted + candidates);
    threshold = *place;
  }
  const int64_t limit = std::min(width, tokens + 1);
  int64_t kept = 0;
  auto keep = [&](int64_t position) {
    if (kept < limit) rows[kept] = static_cast<int32_t>(position);
    ++kept;
  };
  int64_t rank = 0, c = 0;
  for (; c < tokens && rank < sinks; ++c) {
    if (valid != nullptr && !valid[c]) continue;
    keep(c);
    ++rank;
  }
  for (int64_t i = 0; i < candidates; ++i) {
    if (keys[i] >= threshold) keep(static_cast<int64_t>(keys[i] & 0xffffffffu));
  }
  // The locals: the last `local` real tokens, the coming one last.
  int64_t start = tokens, missing = local - 1;
  for (; missing > 0; --start) missing -= valid == nullptr || valid[start - 1] ? 1 : 0;
  for (; start < tokens; ++start) {
    if (valid == nullptr || valid[start]) keep(start);
  }
  keep(tokens);
  std::fill(rows + std::min(kept, limit), rows + limit, 0);
  if (drops) {
    const int32_t* next = rows;
    const int32_t* const end = rows + std::min(kept, limit);
    for (int64_t position = 0; position < tokens; ++position) {
      if (next != end && *next == position) ++next;
      else own.state[position] = kDropped;
    }
  }
  return static_cast<int32_t>(kept);
}

// Update the scores of every (sequence, group) with `update(pair, ranks of it, state, own)`, then choose.
template <class Score, class Update>
void select(const SelectCall& call, int64_t new_tokens, const Update& update) {
  const int64_t layer = call.layer, batch = call.scores.size[1], groups = call.scores.size[2];
  const int64_t ring = call.scores.size[3], capacity = call.scores.size[4], width = call.rows.size[3];
  const int64_t tokens = call.tokens, pairs = batch * groups;
  // After a dense block, refresh steps count from its end.
  const bool dense_block = tokens == new_tokens || new_tokens > kSparseBlock;
  const bool refresh = call.policy.is_refresh_step(dense_block ? 1 : tokens + 1 - call.origin, layer,
                                                   dense_block ? 1 : new_tokens);
  int32_t* counts = call.counts.data<int32_t>() + layer * pairs;
  // A layer's counts are all -1 or none is; they describe the step that has just run.
  const bool dense = std::any_of(counts, counts + pairs, [](int32_t count) { return count < 0; });
  const int64_t work = pairs * tokens * (ring + 4);
  parallel(pairs, work, [&](int64_t pair) {
    const bool* valid = call.valid ? call.valid.data<bool>() + pair / groups * capacity : nullptr;
    int64_t real = tokens, own = new_tokens;
    if (valid != nullptr) {
      real = std::count(valid, valid + tokens, true);
      own = std::count(valid + tokens - new_tokens, valid + tokens, true);
    }
    Score* state = call.scores.data<Score>() + (layer * pairs + pair) * ring * capacity;
    const Ranks<Score> ranks{state, ring, capacity, real};
    int32_t* rows = call.rows.data<int32_t>() + (layer * pairs + pair) * width;
    update(pair, ranks, state, own, dense ? nullptr : rows, dense ? tokens : counts[pair]);
    counts[pair] = refresh ? kAllRows : choose(ranks, valid, tokens, call.policy, rows, width);
  });
}

template <class Score>
void select_after_step(const SelectCall& call) {
  const Selection& policy = call.policy;
  const int64_t groups = call.scores.size[2], tokens = call.tokens;
  const Tensor& mass = call.mass;
  double fade = 1, boost = 1;
  if (policy.rank == Rank::kDecay) {
    const int64_t exponent = policy.decay_exponent(tokens);
    if (exponent == 0) fade = policy.decay_power(16 * policy.window);
    boost = policy.decay_power(-exponent);
  }
  select<Score>(call, 1, [&](int64_t pair, const Ranks<Score>& ranks, Score* state, int64_t own, const int32_t* rows,
                             int64_t count) {
    const Score* received = mass.data<Score>() + pair / groups * mass.stride[0] + pair % groups * mass.stride[1];
    const int64_t step = mass.stride[2];
    if (fade != 1) {
      for (int64_t c = 0; c < ranks.capacity; ++c) state[c] *= static_cast<Score>(fade);
    }
    if (policy.rank == Rank::kStride || policy.rank == Rank::kHash) return;
    if (own == 0) return;  // the attention row of a padding token counts for nothing
    Score* row = state;
    if (policy.rank == Rank::kRing) {
      row = state + (ranks.real_tokens - 1) % ranks.ring * ranks.capacity;
      std::fill(row, row + ranks.capacity, Score(0));
    }
    // Products are rounded before they are added, as in the reference: a contracted multiply-add would differ.
    Score* added = scratch<Score, 8>(count);
    for (int64_t i = 0; i < count; ++i) added[i] = received[i * step] * static_cast<Score>(boost);
    for (int64_t i = 0; i < count; ++i) row[rows == nullptr ? i : rows[i]] += added[i];
  });
}

template <class Score>
void seed_after_block(const SelectCall& call, int64_t new_tokens) {
  const Selection& policy = call.policy;
  const int64_t groups = call.scores.size[2];
  const Tensor& mass = call.mass;
  const int64_t seeds = mass.size[2], columns = mass.size[3];
  double boost = 1;
  int64_t before = 0, after = 0;
  std::vector<Score> ages(seeds, 1);
  if (policy.rank == Rank::kDecay) {
    before = policy.decay_exponent(call.tokens - new_tokens);
    after = policy.decay_exponent(call.tokens);
    boost = policy.decay_power(-after);
    for (int64_t r = 0; r < seeds; ++r) ages[r] = static_cast<Score>(policy.decay_power(seeds - 1 - r));
  }
  select<Score>(call, new_tokens, [&](int64_t pair, const Ranks<Score>& ranks, Score* state, int64_t own,
                                      const int32_t*, int64_t) {
    const Score* received = mass.data<Score>() + pair / groups * mass.stride[0] + pair % groups * mass.stride[1];
    if (policy.rank == Rank::kStride || policy.rank == Rank::kHash) return;
    if (policy.rank == Rank::kSum) {
      for (int64_t c = 0; c < columns; ++c) state[c] += received[c * mass.stride[3]];
      return;
    }
    if (policy.rank == Rank::kDecay) {
      Score* recent = scratch<Score, 8>(columns);
      std::fill(recent, recent + columns, Score(0));
      for (int64_t r = 0; r < seeds; ++r) {
        const Score* row = received + r * mass.stride[2];
        for (int64_t c = 0; c < columns; ++c) recent[c] += ages[r] * row[c * mass.stride[3]];
      }
      // Older scores fade by the block's real tokens: padding must not age them.
      const auto fade = static_cast<Score>(policy.decay_power(before + own - after));
      for (int64_t c = 0; c < ranks.capacity; ++c) state[c] *= fade;
      for (int64_t c = 0; c < columns; ++c) state[c] += recent[c] * static_cast<Score>(boost);
      return;
    }
    // The j-th real token has ring row j mod R; rows of the block that stand for no token are left alone.
    const int64_t written = std::min({own, seeds, ranks.ring});
    for (int64_t back = written; back >= 1; --back) {
      int64_t slot = (ranks.real_tokens - back) % ranks.ring;
      if (slot < 0) slot += ranks.ring;
      Score* row = state + slot * ranks.capacity;
      const Score* from = received + (seeds - back) * mass.stride[2];
      for (int64_t c = 0; c < columns; ++c) row[c] = from[c * mass.stride[3]];
      std::fill(row + columns, row + ranks.capacity, Score(0));
    }
  });
}

void select_or_seed(StableIValue* stack, bool seed) {
  Arguments arguments(stack);
  Tensor scores = arguments.tensor();
  Tensor rows = arguments.tensor();
  Tensor counts = arguments.tensor();
  Tensor mass = arguments.tensor();
  Tensor length = arguments.tensor();
  Tensor origin = arguments.tensor();
  Tensor valid = arguments.optional_tensor();
  const int64_t new_tokens = seed ? arguments.integer() : 1;
  const int64_t layer = arguments.integer();
  const std::string spec = arguments.string();

  scores.contiguous(5);
  rows.contiguous(4);
  counts.contiguous(3);
  if (valid) valid.contiguous(2);
  require(scores.type == mass.type, "alisa: the attention mass does not have the dtype of the scores");
  const int64_t tokens = length.contiguous(1).data<int64_t>()[layer];
  const int64_t* since = origin.contiguous(1).data<int64_t>();
  require(origin.size[0] == 2, "alisa: the origin has two entries");
  Selection policy = selection_of(spec);
  if (since[1] != 0) policy.max_rows = since[1];
  const SelectCall call{scores, rows, counts, mass, valid, layer, tokens, since[0], policy};
  const bool wide = scores.type == Type::kDouble;
  require(wide || scores.type == Type::kFloat, "alisa: scores are float32 or float64");
  if (seed) {
    wide ? seed_after_block<double>(call, new_tokens) : seed_after_block<float>(call, new_tokens);
  } else {
    wide ? select_after_step<double>(call) : select_after_step<float>(call);
  }
}

void kv_select(StableIValue* stack, uint64_t, uint64_t) { select_or_seed(stack, false); }
void kv_seed(StableIValue* stack, uint64_t, uint64_t) { select_or_seed(stack, true); }

}  // namespace
