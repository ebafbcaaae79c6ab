// What the attention kernels share: exponentials, and dot products of many rows with many queries at a time.

#pragma once
#include "native.h"

namespace {

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

inline float exponential(float x) { return exponential(Vector<float, 16>{} + x)[0]; }
inline double exponential(double x) { return std::exp(x); }

inline Vector<double, 8> exponential(Vector<double, 8> x) {
  for (int i = 0; i < 8; ++i) x[i] = std::exp(x[i]);
  return x;
}

// cap * tanh(x / cap)
template <class Acc>
Lanes<Acc> soft_capped(Lanes<Acc> x, Acc cap) {
  const auto ratio = x / cap, magnitude = ratio < Acc(0) ? -ratio : ratio;
  const auto faded = exponential(magnitude * Acc(-2));
  const auto capped = (Acc(1) - faded) / (Acc(1) + faded) * cap;
  return ratio < Acc(0) ? -capped : capped;
}

// Scratch that begins at a cache line.
template <class T, int kPurpose>
T* aligned(int64_t count) {
  auto address = reinterpret_cast<uintptr_t>(scratch<T, kPurpose>(count + 64 / sizeof(T)));
  return reinterpret_cast<T*>((address + 63) / 64 * 64);
}

template <class Acc>
Acc max_lanes(Lanes<Acc> vector) {
  constexpr int kLanes = kLanesOf<Acc>;
  const auto larger = [](auto pair) { return pair.low > pair.high ? pair.low : pair.high; };
  auto half = larger(bit_cast<Pair<Vector<Acc, kLanes / 2>>>(vector));
  auto quarter = larger(bit_cast<Pair<Vector<Acc, kLanes / 4>>>(half));
  if constexpr (kLanes == 16) {
    auto eighth = larger(bit_cast<Pair<Vector<Acc, kLanes / 8>>>(quarter));
    return eighth[0] > eighth[1] ? eighth[0] : eighth[1];
  } else {
    return quarter[0] > quarter[1] ? quarter[0] : quarter[1];
  }
}

template <class V>
void save(void* address, const V& vector) {
  std::memcpy(address, &vector, sizeof(V));
}

// Sixteen vectors to the vector of their sums.
template <class V>
[[gnu::always_inline]] inline V sum_each(const V* v) {
  V fours[4];
  for (int i = 0; i < 4; ++i) {
    V pairs[2];
    for (int j = 0; j < 2; ++j) {
      const V a = v[4 * i + 2 * j], b = v[4 * i + 2 * j + 1];
      pairs[j] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                 __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    }
    const V a = pairs[0], b = pairs[1];
    fours[i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  V halves[2];
  for (int i = 0; i < 2; ++i) {
    const V a = fours[2 * i], b = fours[2 * i + 1];
    halves[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  const V a = halves[0], b = halves[1];
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

// How rows meet the query and the weights. `prepare` turns a query row into Query elements, zeros beyond, and returns
// the factor that its dot products still need; then `read` and `add` take kElements at a time. With kPairs `add`
// multiplies pairs of 16-bit elements, and weighted sums advance by pairs of rows: `prepare_weights` turns the weights
// of a tile into Weight elements and returns the factor that its sums still need; `low` and `high` interleave two rows;
// `open` and `close` take sums from the output so far, times a factor, and add them to it.

template <class RowType, class AccType>
struct WideDot {  // everything in the accumulation type
  using Row = RowType;
  using Acc = AccType;
  using Query = Acc;
  using Elements = Lanes<Acc>;
  using Sum = Lanes<Acc>;
  static constexpr int kElements = kLanesOf<Acc>;
  static Acc prepare(const Acc* values, int64_t padded, int64_t, void* query) {
    std::memcpy(query, values, padded * sizeof(Acc));
    return 1;
  }
  static Elements read(const Row* row) { return Loader<Row, Acc>::read(row); }
  static Elements read_tail(const Row* row, int64_t count) { return Loader<Row, Acc>::read_tail(row, count); }
  static Sum add(Sum sum, Elements row, Elements query) { return sum + row * query; }
  static Lanes<Acc> finish(Sum sum) { return sum; }
  using Weight = Acc;
  static constexpr bool kPairs = false;
};

#ifdef __AVX512BF16__
struct BFloat16Dot {  // rows and query in bfloat16: products are exact, sums are float32
  using Row = BFloat16;
  using Acc = float;
  using Query = uint16_t;
  using Elements = __m512bh;
  using Sum = Vector<float, 16>;
  static constexpr int kElements = 32;
  static float prepare(const float* values, int64_t padded, int64_t, void* query) {
    for (int64_t d = 0; d < padded; ++d) static_cast<Query*>(query)[d] = bit_cast<uint32_t>(values[d]) >> 16;
    return 1;
  }
  static Elements read(const Row* row) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(row)); }
  static Elements read_tail(const Row* row, int64_t count) {
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16((1u << count) - 1, row));
  }
  static Sum add(Sum sum, Elements row, Elements query) {
    return bit_cast<Sum>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), row, query));
  }
  static Lanes<float> finish(Sum sum) { return sum; }

  using Weight = float;
  static constexpr bool kPairs = false;
};
#endif

// Rows of int8 are asked for so early that the first cache would lose them again.
template <class Row>
constexpr bool kAsksSecondCache = sizeof(Row) == 1;

// Asks for elements [at, at + kElements) of each row: what a later group reads where this one is now. So every row is
// a stream, from its first head to its last, and the hardware follows.
template <int kRows, int kElements, class Row>
[[gnu::always_inline]] inline void ask(const Row* const* rows, int64_t at) {
  constexpr int kLine = 64 / sizeof(Row);
  for (int i = 0; i < kRows; ++i) {
    for (int line = 0; line < kElements; line += kLine) {
      __builtin_prefetch(rows[i] + at + line, 0, kAsksSecondCache<Row> ? 2 : 3);
    }
  }
}

// logits[h * stride + i] = query[h] . rows[i] from element `offset` on, for kRows rows and kHeads query heads.
template <class Dot, int kHeads, int kRows>
[[gnu::always_inline]] inline void dot_tile(const typename Dot::Row* const* rows,
                                            const typename Dot::Row* const* ahead, int64_t offset,
                                            const typename Dot::Query* query, int64_t dim, int64_t padded,
                                            typename Dot::Acc* logits, int64_t stride) {
  using Acc = typename Dot::Acc;
  constexpr int kElements = Dot::kElements;
  const int64_t whole = dim - dim % kElements;
  typename Dot::Sum sums[std::max(16, kHeads * kRows)] = {};
  const auto advance = [&](int64_t d) __attribute__((always_inline)) {
    typename Dot::Elements elements[kRows];
    for (int i = 0; i < kRows; ++i) elements[i] = Dot::read(rows[i] + offset + d);
    for (int h = 0; h < kHeads; ++h) {
      const auto own = load<typename Dot::Elements>(query + h * padded + d);
      for (int i = 0; i < kRows; ++i) sums[h * kRows + i] = Dot::add(sums[h * kRows + i], elements[i], own);
    }
  };
  int64_t d = 0;
  // Two lines of a row at a time: four in a burst cost up to a quarter of the bandwidth in a loop that only reads.
  constexpr int kSteps = std::min<int>(4, 128 / (kElements * sizeof(typename Dot::Row)));
  for (; d + kSteps * kElements <= whole; d += kSteps * kElements) {
    ask<kRows, kSteps * kElements>(ahead, offset + d);
    for (int i = 0; i < kSteps; ++i) advance(d + i * kElements);
  }
  for (; d < whole; d += kElements) {
    ask<kRows, kElements>(ahead, offset + d);
    advance(d);
  }
  if (whole < dim) {
    ask<kRows, 1>(ahead, offset + whole);
    for (int i = 0; i < kRows; ++i) {
      const auto elements = Dot::read_tail(rows[i] + offset + whole, dim - whole);
      for (int h = 0; h < kHeads; ++h) {
        const auto own = load<typename Dot::Elements>(query + h * padded + whole);
        sums[h * kRows + i] = Dot::add(sums[h * kRows + i], elements, own);
      }
    }
  }
  if constexpr (std::is_same_v<Acc, float>) {
    const Lanes<Acc> totals = Dot::finish(sum_each(sums));
    for (int h = 0; h < kHeads; ++h) {
      std::memcpy(logits + h * stride, reinterpret_cast<const float*>(&totals) + h * kRows, kRows * sizeof(float));
    }
  } else {
    for (int h = 0; h < kHeads; ++h) {
      for (int i = 0; i < kRows; ++i) logits[h * stride + i] = sum_lanes<Acc>(Dot::finish(sums[h * kRows + i]));
    }
  }
}

// values[0 .. count) = a row of a tensor from element `index` on.
template <class Acc>
void read_row(const Tensor& tensor, int64_t index, int64_t stride, int64_t count, Acc* values) {
  const auto copy = [&](const auto* from) {
    for (int64_t d = 0; d < count; ++d) values[d] = static_cast<Acc>(from[index + d * stride]);
  };
  switch (tensor.type) {
    case Type::kFloat:
      return copy(tensor.data<float>());
    case Type::kDouble:
      return copy(tensor.data<double>());
    case Type::kBFloat16: {
      const auto* from = tensor.data<uint16_t>();
      for (int64_t d = 0; d < count; ++d) {
        values[d] = bit_cast<float>(static_cast<uint32_t>(from[index + d * stride]) << 16);
      }
      return;
    }
    default:
      for (int64_t d = 0; d < count; ++d) {
        values[d] = static_cast<Acc>(to_double(tensor.data<void>(), tensor.type, index + d * stride));
      }
  }
}

}  // namespace
