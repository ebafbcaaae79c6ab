// What the CPU kernels of the ops share: torch's C shim, tensors and arguments, threads, vectors of row elements.
//
// Each op's kernel is `native.cpp` in the op's folder, and the Python reference beside it says what it must compute.
// `native.py` builds them all as one source. Registered through torch's C shim, so a call never enters Python and
// nothing of libtorch's C++ headers is compiled.
//
// Every reduction has a fixed order: rows go in blocks by position, blocks are combined in order. So the results depend
// neither on the number of threads nor on the slots in which rows live.

#pragma once
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

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

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
  int32_t dtype() const {
    int32_t code;
    check(aoti_torch_get_dtype(handle_, &code));
    return code;
  }
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

// A contiguous tensor of these sizes with the dtype of `like`.
Tensor empty_like_rows(const Tensor& like, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t expected = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = expected;
    expected *= std::max<int64_t>(sizes[d], 1);
  }
  AtenTensorHandle handle;
  check(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), like.dtype(),
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
#ifdef __AVX512F__
    // gcc 12 converts vectors by halves and quarters.
    if constexpr (std::is_same_v<Row, BFloat16> && std::is_same_v<Acc, float>) {
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
      return bit_cast<Lanes<Acc>>(_mm512_slli_epi32(wide, 16));
    } else if constexpr (std::is_same_v<Row, Half> && std::is_same_v<Acc, float>) {
      return bit_cast<Lanes<Acc>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row))));
    } else if constexpr (std::is_same_v<Row, int8_t> && std::is_same_v<Acc, float>) {
      const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
      return bit_cast<Lanes<Acc>>(_mm512_cvtepi32_ps(wide));
    }
#endif
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

}  // namespace
