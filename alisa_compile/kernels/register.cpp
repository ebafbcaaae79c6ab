// Registration of the CPU kernels; `native.py` puts it after them all.

#include "native.h"

// Registers the kernels for CPU tensors; they stay for the life of the process. Returns 0 on success.
extern "C" int alisa_register() {
  TorchLibraryHandle library = nullptr;
  if (aoti_torch_library_init_impl("alisa", "CPU", __FILE__, __LINE__, &library) != AOTI_TORCH_SUCCESS) return 1;
  if (aoti_torch_library_impl(library, "kv_append", kv_append) != AOTI_TORCH_SUCCESS) return 1;
  if (aoti_torch_library_impl(library, "swa_attention", swa_attention) != AOTI_TORCH_SUCCESS) return 1;
  if (aoti_torch_library_impl(library, "swa_attention.tiered", swa_attention_tiered) != AOTI_TORCH_SUCCESS) return 1;
  if (aoti_torch_library_impl(library, "prefill_mass", prefill_mass) != AOTI_TORCH_SUCCESS) return 1;
  if (aoti_torch_library_impl(library, "kv_select", kv_select) != AOTI_TORCH_SUCCESS) return 1;
  if (aoti_torch_library_impl(library, "kv_seed", kv_seed) != AOTI_TORCH_SUCCESS) return 1;
  if (aoti_torch_library_impl(library, "gather_rows", gather_rows) != AOTI_TORCH_SUCCESS) return 1;
  if (aoti_torch_library_impl(library, "scatter_rows", scatter_rows) != AOTI_TORCH_SUCCESS) return 1;
  if (aoti_torch_library_impl(library, "kv_offload", kv_offload) != AOTI_TORCH_SUCCESS) return 1;
  if (aoti_torch_library_impl(library, "kv_prefetch", kv_prefetch) != AOTI_TORCH_SUCCESS) return 1;
  if (aoti_torch_library_impl(library, "kv_wait", kv_wait) != AOTI_TORCH_SUCCESS) return 1;
  if (aoti_torch_library_impl(library, "tiers_open", tiers_open) != AOTI_TORCH_SUCCESS) return 1;
  if (aoti_torch_library_impl(library, "tiers_stage", tiers_stage) != AOTI_TORCH_SUCCESS) return 1;
  if (aoti_torch_library_impl(library, "tiers_pending", tiers_pending) != AOTI_TORCH_SUCCESS) return 1;
  if (aoti_torch_library_impl(library, "tiers_settle", tiers_settle) != AOTI_TORCH_SUCCESS) return 1;
  return 0;
}
