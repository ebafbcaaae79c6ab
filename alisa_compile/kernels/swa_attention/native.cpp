// CPU kernel of alisa::swa_attention; reference.py says what it must compute.
//
// Memory sets the pace, so the work follows the slots. A unit is a block of rows with all heads of their slots, taken
// in tiles of kTile rows: dot products, weights, weighted sum. A few rows advance together, head by head, while the
// same heads of the next few are asked for. So each row is read from its first byte to its last, as the hardware's own
// prefetching wants it; head by head over a whole tile costs a quarter of the bandwidth, and one slot after the other
// would wait for each page to be found.
// The dot products of 16 pairs of a row and a head are reduced together, and where the dtypes allow it they are taken
// without widening the rows to float32 (`BFloat16Dot`, `Int8Dot`); weighted sums then take rows in pairs.
//
// Rows without a device slot are copied to staging when their tile is due: tiles and sums are the same as with slots.

#include "../dots.h"
#include "../tiers.h"

namespace {

// What one (sequence, group) attends to.
struct Attended {
  const int32_t* slots;      // of each position
  const int32_t* positions;  // ascending, or null for every position
  const bool* valid;         // or null
  int64_t count;             // entries, attended or not
  int64_t region;            // of its rows below the device
};

struct Problem {
  int64_t dim, padded_dim, heads, ratio;  // KV heads in a slot, query heads of a KV head
  const void* pool;
  int64_t slots;
  const float* scales;
  double soft_cap;  // 0: none
};

constexpr int64_t kTile = 32;  // rows between two looks at the largest logit
constexpr int64_t kMostTiles = 16;
constexpr int64_t kManyRows = 128;  // from here on weights may be rounded to 16 bits

// Rows in a block: enough blocks to share between threads. It depends on the sequence alone, and so does the order of
// every sum.
int64_t block_rows(int64_t count) {
  return std::clamp<int64_t>((count / 32 + kTile - 1) / kTile, 2, kMostTiles) * kTile;
}

// -------------------------------------------------------------------------------------------------------- dot products

#ifdef __AVX512BF16__
// Weights too, rounded to bfloat16 as the reference does. Their rounding errors average out over many rows.
struct BFloat16PairDot : BFloat16Dot {
  using Weight = uint16_t;
  static constexpr bool kPairs = true;
  static float prepare_weights(Lanes<float> low, Lanes<float> high, Weight* weights) {
    save(weights, _mm512_cvtne2ps_pbh(bit_cast<__m512>(high), bit_cast<__m512>(low)));
    return 1;
  }
  static Elements low(Elements a, Elements b) {
    return reinterpret_cast<__m512bh>(
        _mm512_unpacklo_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
  }
  static Elements high(Elements a, Elements b) {
    return reinterpret_cast<__m512bh>(
        _mm512_unpackhi_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
  }
  static Elements broadcast(const Weight* pair) {
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(load<int32_t>(pair)));
  }
  static Sum open(const float* at, float factor) { return load<Sum>(at) * factor; }
  static void close(float* at, Sum sum, float, float) { save(at, sum); }
};
#endif

#ifdef __AVX512VNNI__
// int8 rows and a query in fixed point: sums are exact. Against its largest element the query keeps 15 bits (fewer past
// 512 elements, where the sums would overflow), far below the rounding of a query in bfloat16 or float16.
struct Int8Dot {
  using Row = int8_t;
  using Acc = float;
  using Query = int16_t;
  using Elements = __m512i;
  using Sum = Vector<int32_t, 16>;
  static constexpr int kElements = 32;
  static float prepare(const float* values, int64_t padded, int64_t dim, void* query) {
    Lanes<float> most = {}, poison = {};
    for (int64_t d = 0; d < padded; d += 16) {
      const auto v = load<Lanes<float>>(values + d);
      const auto magnitude = v < 0.0f ? -v : v;
      most = magnitude > most ? magnitude : most;
      poison += v * 0.0f;
    }
    const auto limit = static_cast<float>(std::min<int64_t>(32767, (int64_t(1) << 31) / (128 * dim) - 1));
    const float unit = std::max(max_lanes<float>(most) / limit, std::numeric_limits<float>::min());
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    for (int64_t d = 0; d < padded; d += 16) {
      const auto rounded = (load<Lanes<float>>(values + d) / unit + magic) - magic;
      save(static_cast<Query*>(query) + d, __builtin_convertvector(rounded, Vector<Query, 16>));
    }
    return unit + sum_lanes<float>(poison);  // NaN if the query is not finite
  }
  static Elements read(const Row* row) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
  }
  static Elements read_tail(const Row* row, int64_t count) {
    return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((1u << count) - 1, row));
  }
  static Sum add(Sum sum, Elements row, Elements query) {
    return bit_cast<Sum>(_mm512_dpwssd_epi32(bit_cast<__m512i>(sum), row, query));
  }
  static Lanes<float> finish(Sum sum) { return __builtin_convertvector(sum, Lanes<float>); }

  // Against the largest of a tile weights keep 15 bits. 32 rows of -128 times that stay below 2^31.
  using Weight = int16_t;
  static constexpr bool kPairs = true;
  static float prepare_weights(Lanes<float> low, Lanes<float> high, Weight* weights) {
    // As integers: NaN is the largest, and the sum becomes NaN through the factor.
    using Bits = Vector<int32_t, 16>;
    const Bits one = bit_cast<Bits>(low) & 0x7fffffff, other = bit_cast<Bits>(high) & 0x7fffffff;
    const float most = bit_cast<float>(max_lanes<int32_t>(one > other ? one : other));
    const float unit = std::max(most * (1 / 32767.0f), std::numeric_limits<float>::min()), inverse = 1 / unit;
    const __m512i first = _mm512_cvtps_epi32(bit_cast<__m512>(low * inverse));
    const __m512i second = _mm512_cvtps_epi32(bit_cast<__m512>(high * inverse));
    save(weights, _mm512_cvtepi32_epi16(first));
    save(weights + 16, _mm512_cvtepi32_epi16(second));
    return unit;
  }
  static Elements low(Elements a, Elements b) { return _mm512_unpacklo_epi16(a, b); }
  static Elements high(Elements a, Elements b) { return _mm512_unpackhi_epi16(a, b); }
  static Elements broadcast(const Weight* pair) { return _mm512_set1_epi32(load<int32_t>(pair)); }
  static Sum open(const float*, float) { return Sum{}; }
  static void close(float* at, Sum sum, float factor, float unit) {
    save(at, load<Lanes<float>>(at) * factor + finish(sum) * unit);
  }
};
#endif

// Rows advance in groups of so many bytes a head: a group and the one that comes next fit the first cache.
template <class Row>
constexpr int64_t kGroup = 16 / sizeof(Row);

// What is asked for is due so many rows later: a group's, or all of a tile's keys and values where that was faster.
template <class Row>
constexpr int64_t kAhead = kAsksSecondCache<Row> ? 2 * kTile : kGroup<Row>;

// logits[h * kTile + i] = query[h] . rows[i] for a group of rows and kHeads query heads.
template <class Dot, int kHeads>
[[gnu::noinline]] void dot_rows(const typename Dot::Row* const* rows, const typename Dot::Row* const* ahead,
                                int64_t offset, const typename Dot::Query* query, int64_t dim, int64_t padded,
                                typename Dot::Acc* logits) {
  constexpr int kMost = std::is_same_v<typename Dot::Acc, float> ? 16 / kHeads : 1;
  constexpr int kRows = std::min<int>(kMost, kGroup<typename Dot::Row>);
  for (int64_t i = 0; i < kGroup<typename Dot::Row>; i += kRows) {
    dot_tile<Dot, kHeads, kRows>(rows + i, ahead + i, offset, query, dim, padded, logits + i, kTile);
  }
}

// ------------------------------------------------------------------------------------------------------- weighted sums

// out[h] = out[h] * factors[h] + sum over rows of weights[h][i] * rows[i], of elements [d, d + kVectors * lanes);
// tail > 0: only so many.
template <class Row, class Acc, int kHeads, int kVectors>
void weigh_columns(const Row* const* rows, const Row* const* ahead, int64_t count, int64_t offset, const Acc* weights,
                   const Acc* factors, const Problem& problem, int64_t d, int64_t tail, Acc* out) {
  constexpr int kLanes = kLanesOf<Acc>;
  Lanes<Acc> sums[kHeads][kVectors];
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVectors; ++v) {
      sums[h][v] = load<Lanes<Acc>>(out + h * problem.padded_dim + d + v * kLanes) * factors[h];
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    ask<1, kVectors * kLanes>(ahead + i, offset + d);
    for (int v = 0; v < kVectors; ++v) {
      const Row* from = rows[i] + offset + d + v * kLanes;
      Lanes<Acc> elements = tail > 0 ? Loader<Row, Acc>::read_tail(from, tail) : Loader<Row, Acc>::read(from);
      for (int h = 0; h < kHeads; ++h) sums[h][v] += elements * weights[h * kTile + i];
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVectors; ++v) save(out + h * problem.padded_dim + d + v * kLanes, sums[h][v]);
  }
}

template <class Row, class Acc, int kHeads>
void weigh_rows(const Row* const* rows, const Row* const* ahead, int64_t count, int64_t offset, const Acc* weights,
                const Acc* factors, const Problem& problem, Acc* out) {
  constexpr int kLanes = kLanesOf<Acc>;
  constexpr int kVectors = 4;
  int64_t d = 0;
  for (; d + kVectors * kLanes <= problem.dim; d += kVectors * kLanes) {
    weigh_columns<Row, Acc, kHeads, kVectors>(rows, ahead, count, offset, weights, factors, problem, d, 0, out);
  }
  for (; d + kLanes <= problem.dim; d += kLanes) {
    weigh_columns<Row, Acc, kHeads, 1>(rows, ahead, count, offset, weights, factors, problem, d, 0, out);
  }
  if (d < problem.dim) {
    weigh_columns<Row, Acc, kHeads, 1>(rows, ahead, count, offset, weights, factors, problem, d, problem.dim - d, out);
  }
}

// The same by pairs of rows, of kVectors * kElements elements; units: what `prepare_weights` returned. Interleaving
// leaves out[h] in an order that `in_order` undoes. The last of an odd number meets zeros: a row that is not attended
// may hold NaN. Unrolled by hand: gcc 12 would keep the sums in memory.
template <class Dot, int kHeads, int kVectors>
[[gnu::noinline]] void weigh_pairs(const typename Dot::Row* const* rows, const typename Dot::Row* const* ahead,
                                   int64_t count, int64_t offset, const typename Dot::Weight* weights,
                                   const float* units, const float* factors, const Problem& problem, int64_t d,
                                   int64_t tail, float* out) {
  using Elements = typename Dot::Elements;
  typename Dot::Sum sums[kHeads][2 * kVectors];
#pragma GCC unroll 16
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 16
    for (int v = 0; v < 2 * kVectors; ++v) {
      sums[h][v] = Dot::open(out + h * problem.padded_dim + d + v * kLanesOf<float>, factors[h]);
    }
  }
  const auto read = [&](int64_t i, int v) __attribute__((always_inline)) {
    const auto* from = rows[i] + offset + d + v * Dot::kElements;
    return tail > 0 ? Dot::read_tail(from, tail) : Dot::read(from);
  };
  for (int64_t i = 0; i < count; i += 2) {
    ask<2, kVectors * Dot::kElements>(ahead + i, offset + d);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const Elements a = read(i, v), b = i + 1 < count ? read(i + 1, v) : Elements{};
      const Elements low = Dot::low(a, b), high = Dot::high(a, b);
#pragma GCC unroll 16
      for (int h = 0; h < kHeads; ++h) {
        const Elements pair = Dot::broadcast(weights + h * kTile + i);
        sums[h][2 * v] = Dot::add(sums[h][2 * v], low, pair);
        sums[h][2 * v + 1] = Dot::add(sums[h][2 * v + 1], high, pair);
      }
    }
  }
#pragma GCC unroll 16
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 16
    for (int v = 0; v < 2 * kVectors; ++v) {
      Dot::close(out + h * problem.padded_dim + d + v * kLanesOf<float>, sums[h][v], factors[h], units[h]);
    }
  }
}

template <class Dot, int kHeads>
void weigh_by_pairs(const typename Dot::Row* const* rows, const typename Dot::Row* const* ahead, int64_t count,
                    int64_t offset, const typename Dot::Weight* weights, const float* units, const float* factors,
                    const Problem& problem, float* out) {
  constexpr int kElements = Dot::kElements;
  int64_t d = 0;
  for (; d + 2 * kElements <= problem.dim; d += 2 * kElements) {
    weigh_pairs<Dot, kHeads, 2>(rows, ahead, count, offset, weights, units, factors, problem, d, 0, out);
  }
  for (; d + kElements <= problem.dim; d += kElements) {
    weigh_pairs<Dot, kHeads, 1>(rows, ahead, count, offset, weights, units, factors, problem, d, 0, out);
  }
  if (d < problem.dim) {
    weigh_pairs<Dot, kHeads, 1>(rows, ahead, count, offset, weights, units, factors, problem, d, problem.dim - d, out);
  }
}

// Sums of interleaved rows to the order of the elements.
inline void in_order(float* out, int64_t size) {
  for (int64_t d = 0; d < size; d += 32) {
    const auto low = load<Lanes<float>>(out + d), high = load<Lanes<float>>(out + d + 16);
    save(out + d, __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
    save(out + d + 16,
         __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31));
  }
}

// -------------------------------------------------------------------------------------------------------------- blocks

// Results of one block of rows for the query heads of one group, `ratio` after `ratio`.
template <class Acc>
struct Partial {
  Acc* largest;  // [query heads]
  Acc* total;    // [query heads] sum of exp(logit - largest)
  Acc* out;      // [query heads, padded_dim] sum of V weighted so
  Acc* weights;  // [tiles, query heads, kTile] exp(logit - largest so far), of attended rows only; or null
  Acc* so_far;   // [tiles, head_size] the largest logit so far
};

// Calls step(first, heads) until `ratio` query heads are done.
template <class Acc, class Step>
void by_heads(int64_t ratio, const Step& step) {
  int64_t first = 0;
  if constexpr (std::is_same_v<Acc, float>) {  // float64 models are for tests: they do without the larger kernels
    for (; first + 4 <= ratio; first += 4) step(first, std::integral_constant<int, 4>());
    for (; first + 2 <= ratio; first += 2) step(first, std::integral_constant<int, 2>());
  }
  for (; first < ratio; ++first) step(first, std::integral_constant<int, 1>());
}

// Scratch of a tile.
template <class Dot>
struct Tile {
  using Acc = typename Dot::Acc;
  Acc* scales;                   // [2 * heads, kTile] of K, then of V
  Acc* factors;                  // [head_size] what the sums so far are scaled by
  Acc* units;                    // [head_size] what `prepare_weights` returned
  typename Dot::Weight* values;  // [query heads, kTile] weights times the scales of V
};

// Logits to weights for the query heads of a tile. `weights` holds the logits before.
template <class Dot>
void weigh_tile(int64_t count, const typename Dot::Acc* query_scales, const Problem& problem,
                const Partial<typename Dot::Acc>& partial, typename Dot::Acc* weights, const Tile<Dot>& tile) {
  using Acc = typename Dot::Acc;
  constexpr int kLanes = kLanesOf<Acc>;
  constexpr int kVectors = kTile / kLanes;
  const int64_t query_heads = problem.heads * problem.ratio;
  const bool scaled = problem.scales != nullptr;
  // The largest logits of all heads first, so that what follows needs no branch.
  for (int64_t head = 0, h = 0; head < problem.heads; ++head) {
    for (int64_t last = h + problem.ratio; h < last; ++h) {
      Acc* own = weights + h * kTile;
      Lanes<Acc> most = Lanes<Acc>{} - std::numeric_limits<Acc>::infinity();
      for (int v = 0; v < kVectors; ++v) {
        auto logits = load<Lanes<Acc>>(own + v * kLanes) * query_scales[h];
        if (scaled) logits *= load<Lanes<Acc>>(tile.scales + head * kTile + v * kLanes);
        save(own + v * kLanes, logits);
        if (count < kTile) {
          std::fill(own + count, own + kTile, -std::numeric_limits<Acc>::infinity());
          logits = load<Lanes<Acc>>(own + v * kLanes);
        }
        most = logits > most ? logits : most;
      }
      tile.factors[h] = max_lanes<Acc>(most);
    }
  }
  for (int64_t h = 0; h < query_heads; h += kLanes) {
    const auto before = load<Lanes<Acc>>(partial.largest + h), most = load<Lanes<Acc>>(tile.factors + h);
    const auto largest = most > before ? most : before;
    const auto factor = most > before ? exponential(before - largest) : Lanes<Acc>{} + Acc(1);
    save(partial.largest + h, largest);
    save(tile.factors + h, factor);
    save(partial.total + h, load<Lanes<Acc>>(partial.total + h) * factor);
  }
  for (int64_t head = 0, h = 0; head < problem.heads; ++head) {
    for (int64_t last = h + problem.ratio; h < last; ++h) {
      Acc* own = weights + h * kTile;
      Lanes<Acc> total = {}, values[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        values[v] = exponential(load<Lanes<Acc>>(own + v * kLanes) - partial.largest[h]);
        save(own + v * kLanes, values[v]);
        total += values[v];
        if (scaled) values[v] *= load<Lanes<Acc>>(tile.scales + (problem.heads + head) * kTile + v * kLanes);
      }
      partial.total[h] += sum_lanes<Acc>(total);
      if constexpr (Dot::kPairs) {
        tile.units[h] = Dot::prepare_weights(values[0], values[1], tile.values + h * kTile);
      } else if (scaled) {
        for (int v = 0; v < kVectors; ++v) save(tile.values + h * kTile + v * kLanes, values[v]);
      }
    }
  }
}

// The logits of a tile, scaled and soft-capped before `weigh_tile`; returns what is left to scale them by: ones.
template <class Dot>
const typename Dot::Acc* cap_tile(const typename Dot::Acc* query_scales, const Problem& problem,
                                  typename Dot::Acc* weights, const Tile<Dot>& tile) {
  using Acc = typename Dot::Acc;
  constexpr int kLanes = kLanesOf<Acc>;
  const int64_t query_heads = problem.heads * problem.ratio;
  const Acc cap = static_cast<Acc>(problem.soft_cap);
  for (int64_t h = 0; h < query_heads; ++h) {
    for (int64_t i = 0; i < kTile; i += kLanes) {
      auto logits = load<Lanes<Acc>>(weights + h * kTile + i) * query_scales[h];
      if (problem.scales != nullptr) logits *= load<Lanes<Acc>>(tile.scales + h / problem.ratio * kTile + i);
      save(weights + h * kTile + i, soft_capped<Acc>(logits, cap));
    }
  }
  if (problem.scales != nullptr) std::fill(tile.scales, tile.scales + problem.heads * kTile, Acc(1));
  Acc* ones = scratch<Acc, 18>(query_heads);
  std::fill(ones, ones + query_heads, Acc(1));
  return ones;
}

// Returns false, and reads no row, if one's slot is outside the pool.
template <class Dot>
bool attend_block(const Attended& attended, int64_t begin, int64_t end, const void* prepared,
                  const typename Dot::Acc* query_scales, const Problem& problem,
                  const Partial<typename Dot::Acc>& partial, Stage* stage) {
  using Row = typename Dot::Row;
  using Acc = typename Dot::Acc;
  const auto* query = static_cast<const typename Dot::Query*>(prepared);
  const int64_t heads = problem.heads, dim = problem.dim, ratio = problem.ratio, padded = problem.padded_dim;
  const int64_t query_heads = heads * ratio, head_size = (query_heads + 15) / 16 * 16;
  std::fill(partial.out, partial.out + query_heads * padded, Acc(0));
  std::fill(partial.largest, partial.largest + head_size, -std::numeric_limits<Acc>::infinity());
  std::fill(partial.total, partial.total + head_size, Acc(0));

  const Row* keys[(kMostTiles + 2) * kTile];  // the last is repeated: tiles are read whole, and one ahead
  const float* scales[(kMostTiles + 2) * kTile];
  int32_t away[(kMostTiles + 2) * kTile];  // positions of rows without a slot, else -1; only with a stage
  int64_t count = 0, gathered = 0;
  bool outside = false;
  for (int64_t i = begin; i < std::min(end + kTile, attended.count); ++i) {
    if (i == end) count = gathered;
    const int64_t position = attended.positions == nullptr ? i : attended.positions[i];
    if (attended.valid != nullptr && !attended.valid[i]) continue;
    const int64_t slot = attended.slots[position];
    if (stage != nullptr) {
      away[gathered] = slot < 0 ? static_cast<int32_t>(position) : -1;
      if (slot < 0) {  // until its tile is due it is where it is: asked for ahead as the others are
        keys[gathered] = reinterpret_cast<const Row*>(stage->source(0, attended.region, position));
        if (problem.scales != nullptr) {
          scales[gathered] = reinterpret_cast<const float*>(stage->source(1, attended.region, position));
        }
        ++gathered;
        continue;
      }
    }
    outside |= static_cast<uint64_t>(slot) >= static_cast<uint64_t>(problem.slots);
    keys[gathered] = static_cast<const Row*>(problem.pool) + slot * 2 * heads * dim;
    if (problem.scales != nullptr) scales[gathered] = problem.scales + slot * 2 * heads;
    ++gathered;
  }
  if (outside) return false;
  if (end >= attended.count) count = gathered;
  if (count == 0) return true;
  std::fill(keys + gathered, keys + count + 2 * kTile, keys[gathered - 1]);
  if (problem.scales != nullptr) std::fill(scales + gathered, scales + count + 2 * kTile, scales[gathered - 1]);

  Acc* local = aligned<Acc, 1>(2 * (query_heads + heads) * kTile + 2 * head_size);
  Acc* more = local + query_heads * kTile;
  Tile<Dot> tile_scratch{more, more + 2 * heads * kTile, more + 2 * heads * kTile + head_size,
                         reinterpret_cast<typename Dot::Weight*>(more + 2 * heads * kTile + 2 * head_size)};
  std::fill(tile_scratch.factors, tile_scratch.factors + head_size, -std::numeric_limits<Acc>::infinity());
  constexpr int64_t kRows = kGroup<Row>;
  static constexpr Acc ones[4] = {1, 1, 1, 1};
  for (int64_t first_row = 0; first_row < count; first_row += kTile) {
    const Row* const* rows = keys + first_row;
    const int64_t tile = first_row / kTile, tile_rows = std::min(kTile, count - first_row);
    if (stage != nullptr) {
      if (!stage->fetch(attended.region, away + first_row, tile_rows)) return true;  // the stage keeps the failure
      for (int64_t i = 0; i < tile_rows; ++i) {
        if (away[first_row + i] < 0) continue;
        keys[first_row + i] = reinterpret_cast<const Row*>(stage->staged(0, i));
        if (problem.scales != nullptr) scales[first_row + i] = reinterpret_cast<const float*>(stage->staged(1, i));
      }
    }
    Acc* weights = partial.weights == nullptr ? local : partial.weights + tile * query_heads * kTile;
    if constexpr (!Dot::kPairs) {
      if (problem.scales == nullptr) tile_scratch.values = weights;
    }
    for (int64_t i = 0; problem.scales != nullptr && i < kTile; ++i) {
      const float* row = scales[first_row + std::min(i, tile_rows - 1)];
      for (int64_t j = 0; j < 2 * heads; j += 16) __builtin_prefetch(scales[first_row + kTile + i] + j);
      for (int64_t j = 0; j < 2 * heads; ++j) tile_scratch.scales[j * kTile + i] = row[j];
    }
    // All keys of the tile, all values, then those of the next: what is asked for is what comes `kAhead` later.
    const Row* stream[4 * kTile];
    for (int64_t i = 0; i < kTile; ++i) {
      stream[i] = rows[i];
      stream[kTile + i] = rows[i] + heads * dim;
      stream[2 * kTile + i] = rows[kTile + i];
      stream[3 * kTile + i] = rows[kTile + i] + heads * dim;
    }
    for (int64_t i = 0; i < tile_rows; i += kRows) {
      for (int64_t head = 0; head < heads; ++head) {
        by_heads<Acc>(ratio, [&](int64_t first, auto size) {
          const int64_t h = head * ratio + first;
          const auto* group = stream + i;
          dot_rows<Dot, decltype(size)::value>(group, first == 0 ? group + kAhead<Row> : group, head * dim,
                                               query + h * padded, dim, padded, weights + h * kTile + i);
        });
      }
    }
    const Acc* logit_scales = query_scales;
    if (problem.soft_cap > 0) logit_scales = cap_tile<Dot>(query_scales, problem, weights, tile_scratch);
    weigh_tile<Dot>(tile_rows, logit_scales, problem, partial, weights, tile_scratch);
    if (partial.weights != nullptr) {
      std::copy(partial.largest, partial.largest + query_heads, partial.so_far + tile * head_size);
    }
    for (int64_t i = 0; i < tile_rows; i += kRows) {
      for (int64_t head = 0; head < heads; ++head) {
        by_heads<Acc>(ratio, [&](int64_t first, auto size) {
          const int64_t h = head * ratio + first, size_of_group = std::min(kRows, tile_rows - i);
          constexpr int kHeads = decltype(size)::value;
          const auto* group = stream + kTile + i;
          const auto* ahead = first == 0 ? group + kAhead<Row> : group;
          const auto* values = tile_scratch.values + h * kTile + i;
          const Acc* factors = i == 0 ? tile_scratch.factors + h : ones;
          Acc* out = partial.out + h * padded;
          if constexpr (Dot::kPairs) {
            const Acc* units = tile_scratch.units + h;
            weigh_by_pairs<Dot, kHeads>(group, ahead, size_of_group, head * dim, values, units, factors, problem, out);
          } else {
            weigh_rows<Row, Acc, kHeads>(group, ahead, size_of_group, head * dim, values, factors, problem, out);
          }
        });
      }
    }
  }
  if constexpr (Dot::kPairs) in_order(partial.out, query_heads * padded);
  return true;
}

// ---------------------------------------------------------------------------------------------------------- the kernel

struct AttentionCall {
  Tensor &query, &pool, &scales, &table, &valid, &rows, &counts;
  int64_t layer, tokens;
  double scale, soft_cap;
  Tensor &out, &mass;
  Tiers* tiers;  // of the rows without a slot; null: all have one
};

template <class Acc>
struct Kernel {
  int64_t elements, query_bytes;  // at a time, and of one prepared element
  Acc (*prepare)(const Acc*, int64_t, int64_t, void*);
  using Attend = bool(const Attended&, int64_t, int64_t, const void*, const Acc*, const Problem&, const Partial<Acc>&,
                      Stage*);
  Attend *few, *many;
};

// For sequences of fewer than kManyRows rows, and for the others.
template <class Few, class Many = Few>
Kernel<typename Few::Acc> kernel_of() {
  return {Few::kElements, sizeof(typename Few::Query), Few::prepare, attend_block<Few>, attend_block<Many>};
}

template <class Acc>
Kernel<Acc> kernel_for(Type rows, Type query) {
  if constexpr (std::is_same_v<Acc, float>) {
#ifdef __AVX512BF16__
    if (rows == Type::kBFloat16 && query == Type::kBFloat16) {
      return kernel_of<BFloat16Dot, BFloat16PairDot>();
    }
#endif
#ifdef __AVX512VNNI__
    if (rows == Type::kInt8 && (query == Type::kBFloat16 || query == Type::kHalf)) return kernel_of<Int8Dot>();
#endif
  }
  switch (rows) {
    case Type::kFloat:
      return kernel_of<WideDot<float, Acc>>();
    case Type::kDouble:
      return kernel_of<WideDot<double, Acc>>();
    case Type::kBFloat16:
      return kernel_of<WideDot<BFloat16, Acc>>();
    case Type::kHalf:
      return kernel_of<WideDot<Half, Acc>>();
    case Type::kInt8:
      return kernel_of<WideDot<int8_t, Acc>>();
    default:
      throw std::runtime_error("alisa: unsupported dtype of the store");
  }
}

// tensor[index ..] = values * factor.
template <class Acc>
void write_row(Tensor& tensor, int64_t index, int64_t count, const Acc* values, Acc factor) {
  switch (tensor.type) {
    case Type::kFloat:
      for (int64_t d = 0; d < count; ++d) tensor.data<float>()[index + d] = values[d] * factor;
      return;
    case Type::kBFloat16:
      for (int64_t d = 0; d < count; ++d) tensor.data<uint16_t>()[index + d] = to_bfloat16(values[d] * factor);
      return;
    default:
      for (int64_t d = 0; d < count; ++d) store(tensor.data<void>(), tensor.type, index + d, values[d] * factor);
  }
}

// Units whose rows may be below: every worker has a tile's part of staging and takes unit after unit, since some copy
// many rows and some none.
template <class Body>
void attend_from_below(Tiers& tiers, int64_t layer, int64_t units, int64_t tile_rows, int64_t work, const Body& body) {
  const int64_t parts = tiers.staging_rows() / tile_rows, workers = std::clamp<int64_t>(parts, 1, units);
  Device small = {};  // where staging cannot hold a tile: one of ours, which any plan's can
  if (parts == 0) {
    small = {{aligned<char, 12>(tile_rows * tiers.row_bytes(0)), aligned<char, 13>(tile_rows * tiers.row_bytes(1))}};
  }
  std::atomic<int64_t> next{0};
  Tally tally;
  parallel(workers, work, [&](int64_t worker) {
    Stage stage(tiers, layer, parts == 0 ? small : tiers.staging(worker * tile_rows));
    for (int64_t unit; stage.failure.empty() && (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) {
      body(unit, &stage);
    }
    tally.add(stage);
  });
  tiers.note(tally.traffic, tally.failure);
}

template <class Acc>
void attend(const AttentionCall& call) {
  const Kernel<Acc> kernel = kernel_for<Acc>(call.pool.type, call.query.type);
  const int64_t batch = call.table.size[1], groups = call.table.size[2], capacity = call.table.size[3];
  const int64_t heads = call.pool.size[2], dim = call.query.size[3], all_heads = call.query.size[1];
  const int64_t query_heads = all_heads / groups, ratio = query_heads / heads, layer = call.layer;
  const int64_t padded = (dim + kernel.elements - 1) / kernel.elements * kernel.elements;
  const Problem problem{dim, padded, heads, ratio, call.pool.data<void>(), call.pool.size[0],
                        call.scales ? call.scales.data<float>() : nullptr, call.soft_cap};

  char* queries = aligned<char, 2>(batch * all_heads * padded * kernel.query_bytes);
  Acc* query_scales = scratch<Acc, 4>(batch * all_heads + padded);
  Acc* values = query_scales + batch * all_heads;
  std::fill(values + dim, values + padded, Acc(0));
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < all_heads; ++h) {
      const int64_t row = b * all_heads + h;
      read_row(call.query, b * call.query.stride[0] + h * call.query.stride[1], call.query.stride[3], dim, values);
      const Acc factor = kernel.prepare(values, padded, dim, queries + row * padded * kernel.query_bytes);
      query_scales[row] = factor * static_cast<Acc>(call.scale);
    }
  }

  // Working sets of each (sequence, group).
  const bool selects = static_cast<bool>(call.rows) && static_cast<bool>(call.counts);
  const int32_t* counts = selects ? call.counts.data<int32_t>() + layer * batch * groups : nullptr;
  bool dense = !selects;
  for (int64_t i = 0; selects && i < batch * groups; ++i) dense = dense || counts[i] < 0;
  const int64_t width = selects ? call.rows.size[3] : 0;
  auto attended = [&](int64_t pair) -> Attended {
    const int64_t b = pair / groups, at = layer * batch * groups + pair;
    const int32_t* slots = call.table.data<int32_t>() + at * capacity;
    const int64_t region = call.tiers == nullptr ? 0 : call.tiers->region(layer, b, pair % groups);
    if (dense) {
      return {slots, nullptr, call.valid ? call.valid.data<bool>() + b * capacity : nullptr, call.tokens, region};
    }
    return {slots, call.rows.data<int32_t>() + at * width, nullptr, counts[pair], region};
  };
  require(call.tokens <= capacity, "alisa: the length is beyond the table");
  for (int64_t pair = 0; !dense && pair < batch * groups; ++pair) {  // ascending, so the ends are enough
    const Attended own = attended(pair);
    const bool inside = own.count == 0 || (own.positions[0] >= 0 && own.positions[own.count - 1] < capacity);
    require(own.count <= width && inside, "alisa: a chosen row is beyond the table");
  }
  int64_t blocks = 1, attended_rows = 0, most_rows = 1;
  for (int64_t pair = 0; pair < batch * groups; ++pair) {
    const int64_t count = attended(pair).count, rows = block_rows(count);
    blocks = std::max(blocks, (count + rows - 1) / rows);
    attended_rows += count;
    most_rows = std::max(most_rows, count);
  }

  // A unit is one block of a pair. The largest logits and the totals of a pair lie by block, then by head.
  const bool wanted = call.mass.size[2] > 0;
  const int64_t pairs = batch * groups, units = pairs * blocks;
  const int64_t head_size = (query_heads + 15) / 16 * 16, out_size = query_heads * padded;
  int64_t most_tiles = 0;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    most_tiles = std::max(most_tiles, block_rows(attended(pair).count) / kTile);
  }
  const int64_t weights_size = wanted ? most_tiles * query_heads * kTile : 0;
  const int64_t so_far_size = wanted ? most_tiles * head_size : 0;
  const int64_t unit_size = 2 * head_size + out_size + weights_size + so_far_size;
  Acc* partials = aligned<Acc, 3>(units * unit_size);
  auto partial_of = [&](int64_t pair, int64_t block) -> Partial<Acc> {
    Acc* base = partials + (pair * blocks + block) * unit_size;
    Acc* weights = base + 2 * head_size + out_size;
    return {base, base + head_size, base + 2 * head_size, wanted ? weights : nullptr, weights + weights_size};
  };
  std::atomic<bool> outside{false};
  const auto attend_unit = [&](int64_t unit, Stage* stage) {
    const int64_t pair = unit / blocks, block = unit % blocks;
    const Attended own = attended(pair);
    const int64_t rows = block_rows(own.count), begin = block * rows;
    if (begin >= own.count && block > 0) return;
    auto* attend_rows = own.count < kManyRows ? kernel.few : kernel.many;
    if (!attend_rows(own, begin, std::min(begin + rows, own.count),
                     queries + pair * query_heads * padded * kernel.query_bytes, query_scales + pair * query_heads,
                     problem, partial_of(pair, block), stage)) {
      outside.store(true, std::memory_order_relaxed);
    }
  };
  const int64_t work = attended_rows * query_heads * dim;
  if (call.tiers == nullptr) {
    parallel(units, work, [&](int64_t unit) { attend_unit(unit, nullptr); });
  } else {
    attend_from_below(*call.tiers, layer, units, std::min(kTile, most_rows), work, attend_unit);
  }
  require(!outside, "alisa: a slot of the table is beyond the pool");

  // Combine the blocks of each pair in order.
  Acc* largests = aligned<Acc, 6>(2 * pairs * head_size);
  Acc* inverses = largests + pairs * head_size;
  parallel(pairs * heads, units * out_size, [&](int64_t index) {
    const int64_t pair = index / heads, head = index % heads;
    const int64_t count = attended(pair).count, rows = block_rows(count);
    const int64_t used = std::max<int64_t>(1, (count + rows - 1) / rows);
    Acc* sums = scratch<Acc, 5>(padded);
    for (int64_t h = head * ratio; h < (head + 1) * ratio; ++h) {
      Acc largest = -std::numeric_limits<Acc>::infinity();
      for (int64_t k = 0; k < used; ++k) {
        const Acc candidate = partial_of(pair, k).largest[h];
        largest = candidate > largest ? candidate : largest;
      }
      Acc total = 0;
      std::fill(sums, sums + padded, Acc(0));
      for (int64_t k = 0; k < used; ++k) {
        const Partial<Acc> partial = partial_of(pair, k);
        // A block without any attended row has nothing to add; its share would be exp(-inf + inf).
        if (partial.total[h] == 0) continue;
        const Acc share = exponential(partial.largest[h] - largest);
        total += share * partial.total[h];
        for (int64_t d = 0; d < padded; ++d) sums[d] += share * partial.out[h * padded + d];
      }
      // A sequence that attends to nothing (all padding) gets zeros.
      const Acc inverse = total == 0 ? Acc(0) : 1 / total;
      largests[pair * head_size + h] = largest;
      inverses[pair * head_size + h] = inverse;
      write_row(call.out, (pair * query_heads + h) * dim, dim, sums, inverse);
    }
  });
  if (!wanted) return;
  parallel(units, attended_rows * query_heads, [&](int64_t unit) {
    const int64_t pair = unit / blocks, block = unit % blocks, columns = call.mass.size[2];
    const Attended own = attended(pair);
    const int64_t rows = block_rows(own.count), begin = block * rows, end = std::min(begin + rows, own.count);
    Acc* mass = call.mass.data<Acc>() + pair * columns;
    if (block == 0) std::fill(mass + own.count, mass + columns, Acc(0));
    const Partial<Acc> partial = partial_of(pair, block);
    int64_t row = begin;
    for (int64_t tile = 0; row < end; ++tile) {
      alignas(64) Acc summed[kTile] = {};
      for (int64_t first = 0; first < query_heads; first += kLanesOf<Acc>) {
        const Acc* largest = largests + pair * head_size + first;
        Lanes<Acc> shares = exponential(load<Lanes<Acc>>(partial.so_far + tile * head_size + first) -
                                        load<Lanes<Acc>>(largest));
        const int64_t last = std::min<int64_t>(first + kLanesOf<Acc>, query_heads);
        for (int64_t h = first; h < last; ++h) {
          const Acc share = shares[h - first] * inverses[pair * head_size + h];
          const Acc* weights = partial.weights + (tile * query_heads + h) * kTile;
          for (int i = 0; i < kTile; ++i) summed[i] += share * weights[i];
        }
      }
      for (int i = 0; i < kTile && row < end; ++row) {  // weights are those of the attended rows only
        mass[row] = own.valid == nullptr || own.valid[row] ? summed[i++] : 0;
      }
    }
  });
}

// Both overloads; `tiered` has a ticket as well.
void decode_step(StableIValue* stack, bool tiered) {
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
  Tensor ticket = tiered ? arguments.tensor() : Tensor();
  const double soft_cap = arguments.real();

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

  std::shared_ptr<Tiers> tiers;
  if (tiered) {
    tiers = tiers_of(ticket);
    const int64_t lists = table.size[1] * table.size[2];
    bool dense = !rows || !counts;
    for (int64_t i = 0; !dense && i < lists; ++i) dense = counts.data<int32_t>()[layer * lists + i] < 0;
    const int64_t missed = dense ? 0 : tiers->misses(layer);
    if (dense ? tiers->below(layer) == 0 : missed == 0) {
      tiers.reset();  // all that is attended to has a slot
    } else {
      require(lists == tiers->batch * tiers->groups, "alisa: the table does not have the shape of the store");
      tiers->device(pool, scales);
      tiers->drain();
      int64_t traffic[kTrafficPlaces] = {};
      traffic[kRowsMissed] = missed;
      tiers->note(traffic, "");
    }
  }
  const AttentionCall call{query, pool, scales, table, valid, rows, counts, layer, tokens, scale, soft_cap, out, mass,
                           tiers.get()};
  wide ? attend<double>(call) : attend<float>(call);
  stack[0] = result(std::move(out));
  stack[1] = result(std::move(mass));
}

void swa_attention(StableIValue* stack, uint64_t, uint64_t) { decode_step(stack, false); }
void swa_attention_tiered(StableIValue* stack, uint64_t, uint64_t) { decode_step(stack, true); }

}  // namespace
