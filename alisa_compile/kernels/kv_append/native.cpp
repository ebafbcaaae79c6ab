// CPU kernel of alisa::kv_append; reference.py says what it must compute.

#include "../native.h"

namespace {

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
        require(slot >= 0, "alisa: a new token has no slot on the device");
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

}  // namespace
