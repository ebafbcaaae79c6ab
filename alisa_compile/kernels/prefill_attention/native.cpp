// CPU kernel of alisa::prefill_mass; `last_rows_mass` of reference.py says what it must compute.
//
// A block of query rows at a time: the logits of all its heads, then the softmax of each row and the sum over heads. So
// a logit is computed once, and the block's size bounds the memory: nothing grows with the square of the prompt.

#include "../dots.h"

namespace {

constexpr int64_t kMassColumns = 64;      // keys of a unit: with a few queries they stay in the first cache
constexpr int64_t kMassLogits = 1 << 21;  // logits of a block of query rows

struct MassCall {
  Tensor &query, &key, &valid, &mass;
  int64_t start;
  double scale, soft_cap;
};

template <class Dot>
void last_rows(const MassCall& call) {
  using Acc = typename Dot::Acc;
  using Row = typename Dot::Row;
  using Query = typename Dot::Query;
  constexpr int kLanes = kLanesOf<Acc>;
  constexpr int kHeads = std::is_same_v<Acc, float> ? 4 : 1, kRows = kHeads;
  const Tensor &query = call.query, &key = call.key;
  const int64_t batch = query.size[0], query_heads = query.size[1], length = query.size[2], dim = query.size[3];
  const int64_t heads = key.size[1], columns = key.size[2], ratio = query_heads / heads;
  const int64_t groups = call.mass.size[1], rows = call.mass.size[2];
  const int64_t padded = (dim + Dot::kElements - 1) / Dot::kElements * Dot::kElements;
  const int64_t width = (columns + kMassColumns - 1) / kMassColumns * kMassColumns;
  const bool* valid = call.valid ? call.valid.data<bool>() : nullptr;
  const int64_t valid_width = call.valid ? call.valid.size[1] : 0;

  // The last real queries of each sequence, oldest first; -1 where it has fewer.
  std::vector<int64_t> chosen(batch * rows, -1);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = length - 1, r = rows - 1; t >= 0 && r >= 0; --t) {
      if (valid == nullptr || valid[b * valid_width + call.start + t]) chosen[b * rows + r--] = t;
    }
  }

  const int64_t block = std::clamp<int64_t>(kMassLogits / (batch * query_heads * width), 1, std::max<int64_t>(rows, 1));
  const int64_t packed = (ratio * block + kHeads - 1) / kHeads * kHeads;  // queries of a KV head, whole tiles
  Query* queries = aligned<Query, 14>(batch * heads * packed * padded);
  Acc* factors = aligned<Acc, 15>(batch * heads * packed + padded);
  Acc* values = factors + batch * heads * packed;
  Acc* logits = aligned<Acc, 16>(batch * heads * packed * width);
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t count = std::min(block, rows - first);
    int64_t seen = 0;  // columns that some row of the block attends to
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t r = 0; r < count; ++r) seen = std::max(seen, chosen[b * rows + first + r] + call.start + 1);
      for (int64_t head = 0; head < heads; ++head) {
        for (int64_t i = 0; i < packed; ++i) {  // row after row, in a row the queries that share the KV head
          const int64_t at = (b * heads + head) * packed + i, r = i / ratio;
          const int64_t t = r < count ? chosen[b * rows + first + r] : -1;
          std::fill(values, values + padded, Acc(0));
          if (t >= 0) {
            const int64_t index =
                b * query.stride[0] + (head * ratio + i % ratio) * query.stride[1] + t * query.stride[2];
            read_row(query, index, query.stride[3], dim, values);
          }
          factors[at] = Dot::prepare(values, padded, dim, queries + at * padded) * static_cast<Acc>(call.scale);
        }
      }
    }
    const int64_t parts = (seen + kMassColumns - 1) / kMassColumns;
    const int64_t used = (ratio * count + kHeads - 1) / kHeads * kHeads;
    parallel(batch * heads * parts, batch * heads * used * seen * dim, [&](int64_t unit) {
      const int64_t pair = unit / parts, begin = unit % parts * kMassColumns;
      const Row* keys[kMassColumns];
      const Row* base = key.data<Row>() + pair / heads * key.stride[0] + pair % heads * key.stride[1];
      for (int64_t i = 0; i < kMassColumns; ++i) keys[i] = base + std::min(begin + i, columns - 1) * key.stride[2];
      for (int64_t q = 0; q < used; q += kHeads) {
        const int64_t at = pair * packed + q;
        for (int64_t i = 0; i < kMassColumns; i += kRows) {
          const Row* const* ahead = keys + std::min(i + kRows, kMassColumns - kRows);
          dot_tile<Dot, kHeads, kRows>(keys + i, ahead, 0, queries + at * padded, dim, padded,
                                       logits + at * width + begin + i, width);
        }
      }
    });
    parallel(batch * groups * count, batch * query_heads * count * seen * 16, [&](int64_t unit) {
      const int64_t list = unit / count, r = unit % count, b = list / groups;
      const int64_t t = chosen[b * rows + first + r], position = t + call.start;
      Acc* mass = call.mass.data<Acc>() + (list * rows + first + r) * columns;
      std::fill(mass, mass + columns, Acc(0));
      if (t < 0) return;
      const int64_t end = position + 1, whole = (end + kLanes - 1) / kLanes * kLanes;
      Acc* sums = aligned<Acc, 17>(2 * width);
      Acc* attended = sums + width;  // 1 or 0
      std::fill(sums, sums + whole, Acc(0));
      for (int64_t c = 0; c < whole; ++c) {
        attended[c] = c == position || (c < end && (valid == nullptr || valid[b * valid_width + c])) ? Acc(1) : Acc(0);
      }
      const Lanes<Acc> none = Lanes<Acc>{} - std::numeric_limits<Acc>::infinity();
      for (int64_t h = 0; h < query_heads / groups; ++h) {
        const int64_t own = list % groups * (query_heads / groups) + h;  // query head
        const int64_t at = (b * heads + own / ratio) * packed + r * ratio + own % ratio;
        Acc* row = logits + at * width;
        Acc factor = factors[at];
        if (call.soft_cap > 0) {
          const Acc cap = static_cast<Acc>(call.soft_cap);
          for (int64_t c = 0; c < whole; c += kLanes) {
            save(row + c, soft_capped<Acc>(load<Lanes<Acc>>(row + c) * factor, cap));
          }
          factor = 1;
        }
        Lanes<Acc> most = none, total = {};
        for (int64_t c = 0; c < whole; c += kLanes) {
          const auto here = load<Lanes<Acc>>(row + c) * factor;
          const auto masked = load<Lanes<Acc>>(attended + c) != Acc(0) ? here : none;
          save(row + c, masked);
          most = masked > most ? masked : most;
        }
        const Acc largest = max_lanes<Acc>(most);
        for (int64_t c = 0; c < whole; c += kLanes) {
          const auto weight = exponential(load<Lanes<Acc>>(row + c) - largest);
          save(row + c, weight);
          total += weight;
        }
        const Acc inverse = 1 / sum_lanes<Acc>(total);
        for (int64_t c = 0; c < whole; c += kLanes) {
          save(sums + c, load<Lanes<Acc>>(sums + c) + load<Lanes<Acc>>(row + c) * inverse);
        }
      }
      std::copy(sums, sums + end, mass);
    });
  }
}

void prefill_mass(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor query = arguments.tensor();
  Tensor key = arguments.tensor();
  Tensor valid = arguments.optional_tensor();
  const int64_t groups = arguments.integer(), rows = arguments.integer(), start = arguments.integer();
  const double scale = arguments.real(), soft_cap = arguments.real();
  require(query.dim == 4 && key.dim == 4 && query.size[0] == key.size[0] && query.size[3] == key.size[3] &&
              query.size[1] % key.size[1] == 0 && query.size[1] % groups == 0 && query.type == key.type,
          "alisa: the query and the key of a prompt do not belong together");
  require(key.stride[3] == 1, "alisa: the elements of a key must lie together");
  require(rows <= query.size[2] && start + query.size[2] <= key.size[2], "alisa: more rows than there are queries");
  if (valid) require(valid.contiguous(2).size[1] >= key.size[2], "alisa: the mask is shorter than the prompt");
  const bool wide = query.type == Type::kDouble;
  Tensor mass = empty({query.size[0], groups, rows, key.size[2]}, wide ? Type::kDouble : Type::kFloat);
  const MassCall call{query, key, valid, mass, start, scale, soft_cap};
  switch (query.type) {
    case Type::kFloat:
      last_rows<WideDot<float, float>>(call);
      break;
    case Type::kDouble:
      last_rows<WideDot<double, double>>(call);
      break;
    case Type::kHalf:
      last_rows<WideDot<Half, float>>(call);
      break;
    case Type::kBFloat16:
#ifdef __AVX512BF16__
      last_rows<BFloat16Dot>(call);
#else
      last_rows<WideDot<BFloat16, float>>(call);
#endif
      break;
    default:
      throw std::runtime_error("alisa: unsupported dtype of a prompt");
  }
  stack[0] = result(std::move(mass));
}

}  // namespace
