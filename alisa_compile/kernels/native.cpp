// CPU kernels of the decode step: alisa::kv_append, alisa::swa_attention, alisa::kv_select, alisa::kv_seed.
//
// The Python references beside the ops say what these must compute. Registered through torch's C shim, so a call never
// enters Python and nothing of libtorch's C++ headers is compiled. `native.py` builds this file.
//
// Every reduction has a fixed order: rows go in blocks of kBlockRows by position, blocks are combined in order. So the
// results depend neither on the number of threads nor on the slots in which rows live.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t kBlockRows = 256;
constexpr int64_t kPrefetchRows = 8;
// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kParallelWork = 1 << 17;
constexpr int32_t kAllRows = -1;

void check(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("alisa: a call into torch failed");
}

void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(message);
}

// ---------------------------------------------------------------------------------------------- tensors and arguments

enum class Type { kFloat, kDouble, kHalf, kBFloat16, kInt8, kUInt8, kInt16, kInt32, kInt64, kBool };

Type type_of(int32_t dtype) {
  static const int32_t codes[] = {
      aoti_torch_dtype_float32(), aoti_torch_dtype_float64(), aoti_torch_dtype_float16(), aoti_torch_dtype_bfloat16(),
      aoti_torch_dtype_int8(),    aoti_torch_dtype_uint8(),   aoti_torch_dtype_int16(),   aoti_torch_dtype_int32(),
      aoti_torch_dtype_int64(),   aoti_torch_dtype_bool()};
  for (size_t i = 0; i < sizeof(codes) / sizeof(codes[0]); ++i) {
    if (codes[i] == dtype) return static_cast<Type>(i);
  }
  throw std::runtime_error("alisa: unsupported dtype");
}

int64_t bytes_of(Type type) {
  switch (type) {
    case Type::kDouble:
    case Type::kInt64:
      return 8;
    case Type::kFloat:
    case Type::kInt32:
      return 4;
    case Type::kHalf:
    case Type::kBFloat16:
    case Type::kInt16:
      return 2;
    default:
      return 1;
  }
}

// A tensor argument: owns its handle; absent if the argument is None.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
    check(aoti_torch_get_sizes(handle, &size));
    check(aoti_torch_get_strides(handle, &stride));
    check(aoti_torch_get_dim(handle, &dim));
    check(aoti_torch_get_data_ptr(handle, &data_));
    int32_t dtype;
    check(aoti_torch_get_dtype(handle, &dtype));
    type = type_of(dtype);
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  Tensor(Tensor&& other) noexcept
      : size(other.size), stride(other.stride), dim(other.dim), type(other.type), handle_(other.handle_),
        data_(other.data_) {
    other.handle_ = nullptr;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  explicit operator bool() const { return handle_ != nullptr; }
  template <class T>
  T* data() const {
    return static_cast<T*>(data_);
  }
  AtenTensorHandle release() {
    AtenTensorHandle handle = handle_;
    handle_ = nullptr;
    return handle;
  }
  // State tensors are a store's own and never views; this guards against a caller that passes a slice of one.
  const Tensor& contiguous(int64_t dimensions) const {
    require(dim == dimensions, "alisa: a tensor has the wrong number of dimensions");
    int64_t expected = 1;
    for (int64_t d = dim - 1; d >= 0; --d) {
      require(size[d] <= 1 || stride[d] == expected, "alisa: the tensors of a store must be contiguous");
      expected *= size[d];
    }
    return *this;
  }

  int64_t* size = nullptr;
  int64_t* stride = nullptr;
  int64_t dim = 0;
  Type type = Type::kFloat;

 private:
  AtenTensorHandle handle_ = nullptr;
  void* data_ = nullptr;
};

Tensor empty(std::initializer_list<int64_t> sizes, Type type) {
  int64_t strides[4];
  int64_t expected = 1;
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
    strides[d] = expected;
    expected *= std::max<int64_t>(sizes.begin()[d], 1);
  }
  int32_t dtype = type == Type::kDouble     ? aoti_torch_dtype_float64()
                  : type == Type::kHalf     ? aoti_torch_dtype_float16()
                  : type == Type::kBFloat16 ? aoti_torch_dtype_bfloat16()
                                            : aoti_torch_dtype_float32();
  AtenTensorHandle handle;
  check(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype,
                                 aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Reads the arguments of a boxed call in schema order; a kernel owns them all and must read each exactly once.
class Arguments {
 public:
  explicit Arguments(const StableIValue* stack) : next_(stack) {}
  Tensor tensor() { return Tensor(to_handle(*next_++)); }
  Tensor optional_tensor() {
    auto* boxed = to<StableIValue*>(*next_++);
    if (boxed == nullptr) return Tensor();
    StableIValue value = *boxed;
    delete boxed;
    return Tensor(to_handle(value));
  }
  int64_t integer() { return to<int64_t>(*next_++); }
  double real() { return to<double>(*next_++); }
  std::string string() {
    auto handle = to<StringHandle>(*next_++);
    const char* text = nullptr;
    size_t length = 0;
    AOTITorchError first = torch_string_c_str(handle, &text);
    AOTITorchError second = torch_string_length(handle, &length);
    std::string copy = first == AOTI_TORCH_SUCCESS && second == AOTI_TORCH_SUCCESS ? std::string(text, length) : "";
    torch_delete_string(handle);
    check(first);
    check(second);
    return copy;
  }

 private:
  template <class T>
  static T to(StableIValue value) {
    static_assert(sizeof(T) == sizeof(StableIValue));
    T result;
    std::memcpy(&result, &value, sizeof(T));
    return result;
  }
  static AtenTensorHandle to_handle(StableIValue value) { return to<AtenTensorHandle>(value); }
  const StableIValue* next_;
};

StableIValue result(Tensor&& tensor) {
  AtenTensorHandle handle = tensor.release();
  StableIValue value = 0;
  std::memcpy(&value, &handle, sizeof(handle));
  return value;
}

// Runs body(i) for i in [0, count): on torch's own threads if the work pays for them.
template <class Body>
void parallel(int64_t count, int64_t work, const Body& body) {
  auto range = [](int64_t begin, int64_t end, void* context) {
    const Body& run = *static_cast<const Body*>(context);
    for (int64_t i = begin; i < end; ++i) run(i);
  };
  void* context = const_cast<void*>(static_cast<const void*>(&body));
  if (count < 2 || work < kParallelWork) return range(0, count, context);
  check(torch_parallel_for(0, count, 1, range, context));
}

// Scratch that a thread keeps between calls: a decode step makes the same calls again and again.
template <class T, int kPurpose>
T* scratch(int64_t count) {
  static thread_local std::vector<T> buffer;
  if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(count);
  return buffer.data();
}

// ------------------------------------------------------------------------------------------------- rows to vectors

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T, int kLanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <class T, int kLanes>
using Vector = typename VectorOf<T, kLanes>::type;
template <class Acc>
constexpr int kLanesOf = 64 / sizeof(Acc);
template <class Acc>
using Lanes = Vector<Acc, kLanesOf<Acc>>;

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V>
V load(const void* address) {
  V vector;
  std::memcpy(&vector, address, sizeof(V));
  return vector;
}

// Bits of half floats to float: shift the exponent by scaling, which also makes subnormals right; repair inf and NaN.
template <int kLanes>
Vector<float, kLanes> half_to_float(Vector<uint16_t, kLanes> half) {
  using Bits = Vector<uint32_t, kLanes>;
  using Floats = Vector<float, kLanes>;
  Bits bits = __builtin_convertvector(half, Bits);
  Bits magnitude = (bits & 0x7fffu) << 13;
  Bits scaled = bit_cast<Bits>(bit_cast<Floats>(magnitude) * 0x1p112f);
  Bits special = magnitude >= 0x0f800000u ? scaled | 0x7f800000u : scaled;
  return bit_cast<Floats>(special | ((bits & 0x8000u) << 16));
}

template <class Row, class Acc>
struct Loader {
  static constexpr int kLanes = kLanesOf<Acc>;
  static Lanes<Acc> read(const Row* row) {
    if constexpr (std::is_same_v<Row, BFloat16>) {
      auto bits = __builtin_convertvector((load<Vector<uint16_t, kLanes>>(row)), Vector<uint32_t, kLanes>) << 16;
      return __builtin_convertvector((bit_cast<Vector<float, kLanes>>(bits)), Lanes<Acc>);
    } else if constexpr (std::is_same_v<Row, Half>) {
      return __builtin_convertvector(half_to_float<kLanes>(load<Vector<uint16_t, kLanes>>(row)), Lanes<Acc>);
    } else if constexpr (std::is_same_v<Row, int8_t>) {
      // In two steps: gcc 12 converts int8 to int32 element by element.
      auto wide = __builtin_convertvector((load<Vector<int8_t, kLanes>>(row)), Vector<int16_t, kLanes>);
      return __builtin_convertvector(__builtin_convertvector(wide, Vector<int32_t, kLanes>), Lanes<Acc>);
    } else {
      return __builtin_convertvector((load<Vector<Row, kLanes>>(row)), Lanes<Acc>);
    }
  }
  // The last elements of a row whose length is no multiple of the lanes; zeros beyond.
  static Lanes<Acc> read_tail(const Row* row, int64_t count) {
    Row padded[kLanes] = {};
    std::memcpy(padded, row, count * sizeof(Row));
    return read(padded);
  }
};

template <class V>
struct Pair {
  V low, high;
};

template <class Acc>
Acc sum_lanes(Lanes<Acc> vector) {
  constexpr int kLanes = kLanesOf<Acc>;
  auto halves = bit_cast<Pair<Vector<Acc, kLanes / 2>>>(vector);
  auto half = halves.low + halves.high;
  auto quarters = bit_cast<Pair<Vector<Acc, kLanes / 4>>>(half);
  auto quarter = quarters.low + quarters.high;
  if constexpr (kLanes == 8) {
    return quarter[0] + quarter[1];
  } else {
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
  }
}

double to_double(const void* address, Type type, int64_t index) {
  switch (type) {
    case Type::kFloat:
      return static_cast<const float*>(address)[index];
    case Type::kDouble:
      return static_cast<const double*>(address)[index];
    case Type::kBFloat16:
      return bit_cast<float>(static_cast<uint32_t>(static_cast<const uint16_t*>(address)[index]) << 16);
    case Type::kHalf: {
      Vector<uint16_t, 2> bits = {static_cast<const uint16_t*>(address)[index], 0};
      return half_to_float<2>(bits)[0];
    }
    case Type::kInt8:
      return static_cast<const int8_t*>(address)[index];
    case Type::kUInt8:
    case Type::kBool:
      return static_cast<const uint8_t*>(address)[index];
    case Type::kInt16:
      return static_cast<const int16_t*>(address)[index];
    case Type::kInt32:
      return static_cast<const int32_t*>(address)[index];
    default:
      return static_cast<double>(static_cast<const int64_t*>(address)[index]);
  }
}

uint16_t to_bfloat16(float value) {
  uint32_t bits = bit_cast<uint32_t>(value);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

uint16_t to_half(float value) {
  uint32_t bits = bit_cast<uint32_t>(value);
  auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00;
  if (bits >= 0x477ff000u) return sign | 0x7c00;  // 65520 and more round to infinity
  if (bits < 0x38800000u) {
    // Below the smallest normal: adding 1/2 puts the 10 bits that stay, rounded, at the bottom of the mantissa.
    return sign | static_cast<uint16_t>(bit_cast<uint32_t>(bit_cast<float>(bits) + 0.5f) - 0x3f000000u);
  }
  bits += 0xc8000fffu + ((bits >> 13) & 1);  // rebias the exponent by -112 and round to nearest even
  return sign | static_cast<uint16_t>(bits >> 13);
}

void store(void* address, Type type, int64_t index, double value) {
  switch (type) {
    case Type::kFloat:
      static_cast<float*>(address)[index] = static_cast<float>(value);
      return;
    case Type::kDouble:
      static_cast<double*>(address)[index] = value;
      return;
    case Type::kBFloat16:
      static_cast<uint16_t*>(address)[index] = to_bfloat16(static_cast<float>(value));
      return;
    case Type::kHalf:
      static_cast<uint16_t*>(address)[index] = to_half(static_cast<float>(value));
      return;
    default:
      throw std::runtime_error("alisa: rows cannot be converted to the dtype of the store");
  }
}

// ------------------------------------------------------------------------------------------------------- kv_append

// Write `[B, heads, T, D]` (D absent for scales) as part 0 (K) or 1 (V) of the slots `[slot, 2, P, D]`.
void write_rows(const Tensor& source, const Tensor& target, const Tensor& table, int64_t layer, int64_t start,
                int64_t part) {
  const int64_t batch = source.size[0], tokens = source.size[2], dim = source.dim == 4 ? source.size[3] : 1;
  const int64_t groups = table.size[2], capacity = table.size[3], heads = target.size[2];
  const int64_t bytes = bytes_of(source.type), target_bytes = bytes_of(target.type);
  const int64_t last_stride = source.dim == 4 ? source.stride[3] : 1;
  require(source.size[1] == groups * heads && (target.dim == 3 || target.size[3] == dim),
          "alisa: the new rows do not have the shape of the store");
  const int32_t* slots = table.data<int32_t>() + layer * table.size[1] * groups * capacity;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t slot = slots[(b * groups + g) * capacity + start + t];
        for (int64_t p = 0; p < heads; ++p) {
          const char* from = source.data<char>() +
                             bytes * (b * source.stride[0] + (g * heads + p) * source.stride[1] + t * source.stride[2]);
          char* to = target.data<char>() + target_bytes * (((slot * 2 + part) * heads + p) * dim);
          if (source.type != target.type) {
            for (int64_t d = 0; d < dim; ++d) store(to, target.type, d, to_double(from, source.type, d * last_stride));
          } else if (last_stride == 1 || dim == 1) {
            std::memcpy(to, from, dim * bytes);
          } else {
            for (int64_t d = 0; d < dim; ++d) std::memcpy(to + d * bytes, from + d * last_stride * bytes, bytes);
          }
        }
      }
    }
  }
}

void kv_append(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor pool = arguments.tensor();
  Tensor scales = arguments.optional_tensor();
  Tensor table = arguments.tensor();
  Tensor length = arguments.tensor();
  Tensor valid = arguments.tensor();
  Tensor key = arguments.tensor();
  Tensor value = arguments.tensor();
  Tensor key_scale = arguments.optional_tensor();
  Tensor value_scale = arguments.optional_tensor();
  Tensor mask = arguments.optional_tensor();
  const int64_t layer = arguments.integer();

  int64_t* stored = length.contiguous(1).data<int64_t>() + layer;
  const int64_t start = *stored, end = start + key.size[2], capacity = table.contiguous(4).size[3];
  require(start >= 0 && end <= capacity, "alisa: the store has no room for the new tokens");
  pool.contiguous(4);
  write_rows(key, pool, table, layer, start, 0);
  write_rows(value, pool, table, layer, start, 1);
  if (scales && key_scale && value_scale) {
    scales.contiguous(3);
    write_rows(key_scale, scales, table, layer, start, 0);
    write_rows(value_scale, scales, table, layer, start, 1);
  }
  if (mask) {
    bool* bits = valid.contiguous(2).data<bool>();
    require(mask.size[1] >= end, "alisa: the padding mask is shorter than the tokens stored");
    for (int64_t b = 0; b < valid.size[0]; ++b) {
      const char* row = mask.data<char>() + bytes_of(mask.type) * b * mask.stride[0];
      bool* out = bits + b * capacity;
      if (mask.type == Type::kInt64 && mask.stride[1] == 1) {  // what tokenizers make, for every step of a padded batch
        const int64_t* values = reinterpret_cast<const int64_t*>(row);
        for (int64_t c = 0; c < end; ++c) out[c] = values[c] != 0;
      } else {
        for (int64_t c = 0; c < end; ++c) out[c] = to_double(row, mask.type, c * mask.stride[1]) != 0;
      }
    }
  }
  *stored = end;
}

// --------------------------------------------------------------------------------------------------- swa_attention

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

// --------------------------------------------------------------------------------------------- kv_select and kv_seed

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
  };
  Share local{0, 1}, dynamic{0, 1};
  int64_t window = 0, sinks = 0, refresh = 0, max_rows = 0;

  explicit Selection(const std::string& text) {
    for (size_t begin = 0; begin < text.size();) {
      const size_t end = std::min(text.find(',', begin), text.size());
      const size_t equals = text.find('=', begin);
      require(equals < end, "alisa: a malformed selection");
      const std::string name = text.substr(begin, equals - begin), value = text.substr(equals + 1, end - equals - 1);
      if (name == "local") local = share(value);
      else if (name == "dynamic") dynamic = share(value);
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
    int64_t rows = std::max<int64_t>(dynamic.of(length), 1);
    if (max_rows != 0) rows = std::min(rows, max_rows - local_cap());
    return std::min(rows, length - local_rows(length));
  }
  int64_t decay_exponent(int64_t length) const { return length % (16 * window); }
  double decay_power(int64_t exponent) const {
    return std::pow(1 - 1 / static_cast<double>(window), static_cast<double>(exponent));
  }
  bool is_refresh_step(int64_t length, int64_t layer) const { return refresh > 0 && (length + layer) % refresh == 0; }

 private:
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

struct SelectCall {
  Tensor &scores, &rows, &counts, &mass, &valid;
  int64_t layer, tokens;
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
  const Score* state;  // [ring, capacity]
  int64_t ring, capacity, real_tokens;
};

// The ranking score of positions [0, tokens): the decayed sum itself, or the sum of Algorithm 1's last rows.
template <class Score>
const Score* ranking(const Ranks<Score>& own, int64_t tokens, const Selection& policy) {
  if (policy.window != 0) return own.state;
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
  if (ranked > 0) {
    const Score* score = ranking(own, tokens, policy);
    if (valid == nullptr) {
      for (int64_t c = sinks; c < first_local; ++c) keys[c - sinks] = Ranked<Score>::key(score[c], c);
      candidates = first_local - sinks;
    } else {
      int64_t rank = 0;
      for (int64_t c = 0; c < tokens && rank < first_local; ++c) {
        if (!valid[c]) continue;
        if (rank++ >= sinks) keys[candidates++] = Ranked<Score>::key(score[c], c);
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
  return static_cast<int32_t>(kept);
}

// Update the scores of every (sequence, group) with `update(pair, ranks of it, state, own)`, then choose.
template <class Score, class Update>
void select(const SelectCall& call, int64_t new_tokens, const Update& update) {
  const int64_t layer = call.layer, batch = call.scores.size[1], groups = call.scores.size[2];
  const int64_t ring = call.scores.size[3], capacity = call.scores.size[4], width = call.rows.size[3];
  const int64_t tokens = call.tokens, pairs = batch * groups;
  const bool refresh = call.policy.is_refresh_step(tokens + 1, layer);
  int32_t* counts = call.counts.data<int32_t>() + layer * pairs;
  // A layer's counts are all -1 or none is; they describe the step that has just run.
  const bool dense = std::any_of(counts, counts + pairs, [](int32_t count) { return count < 0; });
  const int64_t work = pairs * tokens * (call.policy.window != 0 ? 4 : ring + 4);
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
  if (policy.window != 0) {
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
    if (own == 0) return;  // the attention row of a padding token counts for nothing
    Score* row = state;
    if (policy.window == 0) {
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
  double fade = 1, boost = 1;
  std::vector<Score> ages(seeds, 1);
  if (policy.window != 0) {
    const int64_t before = policy.decay_exponent(call.tokens - new_tokens);
    const int64_t after = policy.decay_exponent(call.tokens);
    fade = policy.decay_power(before + new_tokens - after);
    boost = policy.decay_power(-after);
    for (int64_t r = 0; r < seeds; ++r) ages[r] = static_cast<Score>(policy.decay_power(seeds - 1 - r));
  }
  select<Score>(call, new_tokens, [&](int64_t pair, const Ranks<Score>& ranks, Score* state, int64_t own,
                                      const int32_t*, int64_t) {
    const Score* received = mass.data<Score>() + pair / groups * mass.stride[0] + pair % groups * mass.stride[1];
    if (policy.window != 0) {
      Score* recent = scratch<Score, 8>(columns);
      std::fill(recent, recent + columns, Score(0));
      for (int64_t r = 0; r < seeds; ++r) {
        const Score* row = received + r * mass.stride[2];
        for (int64_t c = 0; c < columns; ++c) recent[c] += ages[r] * row[c * mass.stride[3]];
      }
      for (int64_t c = 0; c < ranks.capacity; ++c) state[c] *= static_cast<Score>(fade);
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
  const SelectCall call{scores, rows, counts, mass, valid, layer, tokens, selection_of(spec)};
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

// Registers the kernels for CPU tensors; they stay for the life of the process. Returns 0 on success.
extern "C" int alisa_register() {
  TorchLibraryHandle library = nullptr;
  if (aoti_torch_library_init_impl("alisa", "CPU", __FILE__, __LINE__, &library) != AOTI_TORCH_SUCCESS) return 1;
  if (aoti_torch_library_impl(library, "kv_append", kv_append) != AOTI_TORCH_SUCCESS) return 1;
  if (aoti_torch_library_impl(library, "swa_attention", swa_attention) != AOTI_TORCH_SUCCESS) return 1;
  if (aoti_torch_library_impl(library, "kv_select", kv_select) != AOTI_TORCH_SUCCESS) return 1;
  if (aoti_torch_library_impl(library, "kv_seed", kv_seed) != AOTI_TORCH_SUCCESS) return 1;
  return 0;
}
