// CPU kernel of alisa::swa_attention; reference.py says what it must compute.

#include "../native.h"

namespace {

// What one (sequence, KV head) attends to.
struct Attended {
  const int32_t* slots;      // of each position
  const int32_t* positions;  // ascending, or null for every position
  const bool* valid;         // or null
  int64_t count;             // entries, attended or not
};

template <class Acc>
struct Problem {
  int64_t dim, padded_dim, heads, ratio;  // KV heads in a slot, query heads of a KV head
  const void* pool;
  const float* scales;
  Acc scale;
};

// exp(x) for x <= 0, within 2 ulp; NaN stays NaN. libm's needs -ffast-math to be vectorised.
inline Vector<float, 16> exponential(Vector<float, 16> x) {
  using Floats = Vector<float, 16>;
  using Ints = Vector<int32_t, 16>;
  const Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  Floats bounded = x < -87.0f ? Floats{} - 87.0f : x;
  Floats shifted = bounded * 1.44269504088896341f + magic;
  Floats whole = shifted - magic;
  Floats rest = bounded - whole * 0.693359375f;
  rest = rest - whole * -2.12194440e-4f;
  Floats power = Floats{} + 1.9875691500e-4f;
  power = power * rest + 1.3981999507e-3f;
  power = power * rest + 8.3334519073e-3f;
  power = power * rest + 4.1665795894e-2f;
  power = power * rest + 1.6666665459e-1f;
  power = power * rest + 5.0000001201e-1f;
  power = power * (rest * rest) + rest + 1.0f;
  Ints exponent = (bit_cast<Ints>(shifted) << 23) + (127 << 23);
  Floats scaled = power * bit_cast<Floats>(exponent);
  return x < -87.0f ? Floats{} : scaled;
}

// values[i] = exp(values[i] - largest); returns their sum.
inline float exponentiate(float* values, int64_t count, float largest) {
  Vector<float, 16> total = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    auto powers = exponential(load<Vector<float, 16>>(values + i) - largest);
    std::memcpy(values + i, &powers, sizeof(powers));
    total += powers;
  }
  if (i < count) {
    // Lanes past the end are exp(-100) = 0.
    Vector<float, 16> last = (Vector<float, 16>{} - 100.0f) + largest;
    std::memcpy(&last, values + i, (count - i) * sizeof(float));
    last = exponential(last - largest);
    for (int64_t j = i; j < count; ++j) {
      values[j] = last[j - i];
      total[j - i] += last[j - i];
    }
  }
  return sum_lanes<float>(total);
}

inline double exponentiate(double* values, int64_t count, double largest) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) {
    values[i] = std::exp(values[i] - largest);
    total += values[i];
  }
  return total;
}

// logits[h][i] = query[h] . rows[i] for kHeads query heads; each row is read once.
template <class Row, class Acc, int kHeads>
void dot_rows(const Row* const* rows, int64_t count, const Acc* query, const Problem<Acc>& problem, Acc* logits) {
  constexpr int kLanes = kLanesOf<Acc>;
  const int64_t dim = problem.dim, padded = problem.padded_dim, whole = dim - dim % kLanes;
  for (int64_t i = 0; i < count; ++i) {
    if (i + kPrefetchRows < count) {
      const char* ahead = reinterpret_cast<const char*>(rows[i + kPrefetchRows]);
      for (int64_t byte = 0; byte < dim * int64_t(sizeof(Row)); byte += 64) __builtin_prefetch(ahead + byte);
    }
    Lanes<Acc> sums[kHeads] = {};
    for (int64_t d = 0; d < whole; d += kLanes) {
      Lanes<Acc> elements = Loader<Row, Acc>::read(rows[i] + d);
      for (int h = 0; h < kHeads; ++h) sums[h] += elements * load<Lanes<Acc>>(query + h * padded + d);
    }
    if (whole < dim) {
      Lanes<Acc> elements = Loader<Row, Acc>::read_tail(rows[i] + whole, dim - whole);
      for (int h = 0; h < kHeads; ++h) sums[h] += elements * load<Lanes<Acc>>(query + h * padded + whole);
    }
    for (int h = 0; h < kHeads; ++h) logits[h * kBlockRows + i] = sum_lanes<Acc>(sums[h]);
  }
}

// out[h][d .. d + kVectors * lanes) = sum over i of weights[h][i] * rows[i][d ..]; `tail` > 0: elements in the last one.
template <class Row, class Acc, int kHeads, int kVectors>
void weigh_columns(const Row* const* rows, int64_t count, const Acc* weights, const Problem<Acc>& problem, int64_t d,
                   int64_t tail, Acc* out) {
  constexpr int kLanes = kLanesOf<Acc>;
  Lanes<Acc> sums[kHeads][kVectors] = {};
  for (int64_t i = 0; i < count; ++i) {
    if (i + kPrefetchRows < count) {
      const char* ahead = reinterpret_cast<const char*>(rows[i + kPrefetchRows] + d);
      for (int64_t byte = 0; byte < kVectors * kLanes * int64_t(sizeof(Row)); byte += 64) {
        __builtin_prefetch(ahead + byte);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const Row* from = rows[i] + d + v * kLanes;
      Lanes<Acc> elements = tail > 0 ? Loader<Row, Acc>::read_tail(from, tail) : Loader<Row, Acc>::read(from);
      for (int h = 0; h < kHeads; ++h) sums[h][v] += elements * weights[h * kBlockRows + i];
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    std::memcpy(out + h * problem.padded_dim + d, sums[h], sizeof(sums[h]));
  }
}

template <class Row, class Acc, int kHeads>
void weigh_rows(const Row* const* rows, int64_t count, const Acc* weights, const Problem<Acc>& problem, Acc* out) {
  constexpr int kLanes = kLanesOf<Acc>;
  constexpr int kVectors = 4;
  int64_t d = 0;
  for (; d + kVectors * kLanes <= problem.dim; d += kVectors * kLanes) {
    weigh_columns<Row, Acc, kHeads, kVectors>(rows, count, weights, problem, d, 0, out);
  }
  for (; d + kLanes <= problem.dim; d += kLanes) {
    weigh_columns<Row, Acc, kHeads, 1>(rows, count, weights, problem, d, 0, out);
  }
  if (d < problem.dim) weigh_columns<Row, Acc, kHeads, 1>(rows, count, weights, problem, d, problem.dim - d, out);
}

// Results of one block of rows for the `ratio` query heads of one KV head.
template <class Acc>
struct Partial {
  Acc* largest;  // [ratio]
  Acc* total;    // [ratio] sum of the weights
  Acc* out;      // [ratio, padded_dim] weighted sum of V
  Acc* weights;  // [ratio, kBlockRows] exp(logit - largest), attended rows only
};

// Block `block` of rows for head `head` of a slot, kHeads query heads at a time.
template <class Row, class Acc, int kHeads>
void attend_heads(const Row* const* keys, const Row* const* values, const Acc* key_scales, const Acc* value_scales,
                  int64_t count, const Acc* query, const Problem<Acc>& problem, const Partial<Acc>& partial) {
  dot_rows<Row, Acc, kHeads>(keys, count, query, problem, partial.weights);
  Acc* scaled = scratch<Acc, 1>(kHeads * kBlockRows);
  for (int h = 0; h < kHeads; ++h) {
    Acc* weights = partial.weights + h * kBlockRows;
    Acc largest = -std::numeric_limits<Acc>::infinity();
    for (int64_t i = 0; i < count; ++i) {
      weights[i] *= key_scales == nullptr ? problem.scale : problem.scale * key_scales[i];
      largest = weights[i] > largest ? weights[i] : largest;
    }
    partial.largest[h] = largest;
    partial.total[h] = exponentiate(weights, count, largest);
    if (value_scales != nullptr) {
      for (int64_t i = 0; i < count; ++i) scaled[h * kBlockRows + i] = weights[i] * value_scales[i];
    }
  }
  const Acc* factors = value_scales == nullptr ? partial.weights : scaled;
  weigh_rows<Row, Acc, kHeads>(values, count, factors, problem, partial.out);
}

template <class Row, class Acc>
void attend_block(const Attended& attended, int64_t block, int64_t head, const Acc* query, const Problem<Acc>& problem,
                  Partial<Acc> partial) {
  const Row* keys[kBlockRows];
  const Row* values[kBlockRows];
  Acc key_scales[kBlockRows];
  Acc value_scales[kBlockRows];
  const int64_t begin = block * kBlockRows, end = std::min(begin + kBlockRows, attended.count);
  const int64_t heads = problem.heads, dim = problem.dim;
  int64_t count = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t position = attended.positions == nullptr ? i : attended.positions[i];
    if (attended.valid != nullptr && !attended.valid[i]) continue;
    const int64_t slot = attended.slots[position];
    keys[count] = static_cast<const Row*>(problem.pool) + (slot * 2 * heads + head) * dim;
    values[count] = keys[count] + heads * dim;
    if (problem.scales != nullptr) {
      key_scales[count] = problem.scales[slot * 2 * heads + head];
      value_scales[count] = problem.scales[(slot * 2 + 1) * heads + head];
    }
    ++count;
  }
  const Acc* ks = problem.scales == nullptr ? nullptr : key_scales;
  const Acc* vs = problem.scales == nullptr ? nullptr : value_scales;
  int64_t left = problem.ratio;
  auto step = [&](int64_t done) {
    query += done * problem.padded_dim;
    partial = {partial.largest + done, partial.total + done, partial.out + done * problem.padded_dim,
               partial.weights + done * kBlockRows};
    left -= done;
  };
  if constexpr (std::is_same_v<Acc, float>) {  // float64 models are for tests: they do without the larger kernels
    for (; left >= 4; step(4)) attend_heads<Row, Acc, 4>(keys, values, ks, vs, count, query, problem, partial);
    for (; left >= 2; step(2)) attend_heads<Row, Acc, 2>(keys, values, ks, vs, count, query, problem, partial);
  }
  for (; left >= 1; step(1)) attend_heads<Row, Acc, 1>(keys, values, ks, vs, count, query, problem, partial);
}

struct AttentionCall {
  Tensor &query, &pool, &scales, &table, &valid, &rows, &counts;
  int64_t layer, tokens;
  double scale;
  Tensor &out, &mass;
};

template <class Acc>
using BlockFunction = void (*)(const Attended&, int64_t, int64_t, const Acc*, const Problem<Acc>&, Partial<Acc>);

template <class Acc>
BlockFunction<Acc> block_function(Type rows) {
  switch (rows) {
    case Type::kFloat:
      return attend_block<float, Acc>;
    case Type::kDouble:
      return attend_block<double, Acc>;
    case Type::kBFloat16:
      return attend_block<BFloat16, Acc>;
    case Type::kHalf:
      return attend_block<Half, Acc>;
    case Type::kInt8:
      return attend_block<int8_t, Acc>;
    default:
      throw std::runtime_error("alisa: unsupported dtype of the store");
  }
}

template <class Acc>
void attend(const AttentionCall& call) {
  constexpr int kLanes = kLanesOf<Acc>;
  const int64_t batch = call.table.size[1], groups = call.table.size[2], capacity = call.table.size[3];
  const int64_t heads = call.pool.size[2], dim = call.query.size[3], query_heads = call.query.size[1];
  const int64_t kv_heads = groups * heads, ratio = query_heads / kv_heads, layer = call.layer;
  const int64_t padded = (dim + kLanes - 1) / kLanes * kLanes;
  const Problem<Acc> problem{
      dim, padded, heads, ratio, call.pool.data<void>(), call.scales ? call.scales.data<float>() : nullptr,
      static_cast<Acc>(call.scale)};

  Acc* query = scratch<Acc, 2>(batch * query_heads * padded);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < query_heads; ++h) {
      Acc* row = query + (b * query_heads + h) * padded;
      const int64_t offset = b * call.query.stride[0] + h * call.query.stride[1];
      for (int64_t d = 0; d < dim; ++d) {
        row[d] = static_cast<Acc>(
            to_double(call.query.data<void>(), call.query.type, offset + d * call.query.stride[3]));
      }
      std::fill(row + dim, row + padded, Acc(0));
    }
  }

  // Working sets of each (sequence, group).
  const bool selects = static_cast<bool>(call.rows) && static_cast<bool>(call.counts);
  const int32_t* counts = selects ? call.counts.data<int32_t>() + layer * batch * groups : nullptr;
  bool dense = !selects;
  for (int64_t i = 0; selects && i < batch * groups; ++i) dense = dense || counts[i] < 0;
  const int64_t width = selects ? call.rows.size[3] : 0;
  auto attended = [&](int64_t b, int64_t g) -> Attended {
    const int64_t pair = (layer * batch + b) * groups + g;
    const int32_t* slots = call.table.data<int32_t>() + pair * capacity;
    if (dense) return {slots, nullptr, call.valid ? call.valid.data<bool>() + b * capacity : nullptr, call.tokens};
    return {slots, call.rows.data<int32_t>() + pair * width, nullptr, counts[b * groups + g]};
  };
  int64_t longest = dense ? call.tokens : 0;
  for (int64_t i = 0; !dense && i < batch * groups; ++i) longest = std::max<int64_t>(longest, counts[i]);
  const int64_t blocks = std::max<int64_t>(1, (longest + kBlockRows - 1) / kBlockRows);

  const int64_t units = batch * kv_heads * blocks;
  const int64_t unit_size = ratio * (2 + padded + kBlockRows);
  Acc* partials = scratch<Acc, 3>(units * unit_size);
  auto partial_of = [&](int64_t b, int64_t head, int64_t block) -> Partial<Acc> {
    Acc* base = partials + ((b * kv_heads + head) * blocks + block) * unit_size;
    return {base, base + ratio, base + 2 * ratio, base + 2 * ratio + ratio * padded};
  };
  const BlockFunction<Acc> attend_one = block_function<Acc>(call.pool.type);
  parallel(units, batch * query_heads * longest * dim, [&](int64_t unit) {
    const int64_t block = unit % blocks, head = unit / blocks % kv_heads, b = unit / blocks / kv_heads;
    attend_one(attended(b, head / heads), block, head % heads, query + (b * query_heads + head * ratio) * padded,
               problem, partial_of(b, head, block));
  });

  // Combine the blocks of each (sequence, group) in order.
  const int64_t mass_columns = call.mass.size[2];
  Acc* mass = call.mass.data<Acc>();
  parallel(batch * groups, batch * query_heads * longest, [&](int64_t pair) {
    const int64_t b = pair / groups, g = pair % groups;
    const Attended own = attended(b, g);
    Acc* mass_row = mass + pair * mass_columns;
    std::fill(mass_row, mass_row + mass_columns, Acc(0));
    Acc* factors = scratch<Acc, 4>(blocks + padded);
    Acc* sums = factors + blocks;
    for (int64_t head = g * heads; head < (g + 1) * heads; ++head) {
      for (int64_t r = 0; r < ratio; ++r) {
        Acc largest = -std::numeric_limits<Acc>::infinity();
        for (int64_t k = 0; k < blocks; ++k) {
          const Acc candidate = partial_of(b, head, k).largest[r];
          largest = candidate > largest ? candidate : largest;
        }
        Acc total = 0;
        std::fill(sums, sums + padded, Acc(0));
        for (int64_t k = 0; k < blocks; ++k) {
          const Partial<Acc> partial = partial_of(b, head, k);
          // A block without any attended row has nothing to add; its factor would be exp(-inf + inf).
          const bool nothing = partial.total[r] == 0;
          factors[k] = nothing ? Acc(0) : std::exp(partial.largest[r] - largest);
          if (nothing) continue;
          total += factors[k] * partial.total[r];
          for (int64_t d = 0; d < dim; ++d) sums[d] += factors[k] * partial.out[r * padded + d];
        }
        // A sequence that attends to nothing (all padding) gets zeros.
        const Acc inverse = total == 0 ? Acc(0) : 1 / total;
        const int64_t out = (b * query_heads + head * ratio + r) * dim;
        for (int64_t d = 0; d < dim; ++d) store(call.out.data<void>(), call.out.type, out + d, sums[d] * inverse);
        if (mass_columns == 0) continue;
        for (int64_t k = 0; k < blocks; ++k) {
          const Acc* weights = partial_of(b, head, k).weights + r * kBlockRows;
          const Acc factor = factors[k] * inverse;
          const int64_t end = std::min((k + 1) * kBlockRows, own.count);
          if (own.valid == nullptr) {
            for (int64_t i = k * kBlockRows; i < end; ++i) mass_row[i] += factor * weights[i - k * kBlockRows];
          } else {
            for (int64_t i = k * kBlockRows; i < end; ++i) {
              if (own.valid[i]) mass_row[i] += factor * *weights++;
            }
          }
        }
      }
    }
  });
}

void swa_attention(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor query = arguments.tensor();
  Tensor pool = arguments.tensor();
  Tensor scales = arguments.optional_tensor();
  Tensor table = arguments.tensor();
  Tensor length = arguments.tensor();
  Tensor valid = arguments.optional_tensor();
  Tensor rows = arguments.optional_tensor();
  Tensor counts = arguments.optional_tensor();
  const int64_t layer = arguments.integer();
  const double scale = arguments.real();

  pool.contiguous(4);
  table.contiguous(4);
  if (scales) scales.contiguous(3);
  if (valid) valid.contiguous(2);
  if (rows) rows.contiguous(4);
  if (counts) counts.contiguous(3);
  const int64_t tokens = length.contiguous(1).data<int64_t>()[layer];
  require(query.dim == 4 && query.size[2] == 1 && query.size[3] == pool.size[3] &&
              query.size[1] % (table.size[2] * pool.size[2]) == 0,
          "alisa: the query does not have the shape of a decode step over this store");
  require((pool.type == Type::kInt8) == static_cast<bool>(scales), "alisa: int8 rows need scales, others have none");
  const bool wide = query.type == Type::kDouble;
  Tensor out = empty({query.size[0], query.size[1], 1, query.size[3]}, query.type);
  Tensor mass = empty({table.size[1], table.size[2], rows && counts ? table.size[3] : 0},
                      wide ? Type::kDouble : Type::kFloat);
  const AttentionCall call{query, pool, scales, table, valid, rows, counts, layer, tokens, scale, out, mass};
  wide ? attend<double>(call) : attend<float>(call);
  stack[0] = result(std::move(out));
  stack[1] = result(std::move(mass));
}

}  // namespace
