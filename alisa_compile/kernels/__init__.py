"""The `alisa::` operators, one folder an op: `op.py` (schema, shapes), `reference.py` (the slow, plain-torch truth).

Importing this package registers every op. Shapes below use: L layers of a store, B sequences, G head groups with one
index set each, P KV heads per slot (G * P KV heads in all), Hq query heads, D head_dim, C capacity in tokens, N slots.
"""

from __future__ import annotations

# In a checkout this folder is also found as `kernels`, through the link at the top, and transformers imports a package
# of that name to read its version. Registering the ops a second time would break both.
if __name__ == "alisa_compile.kernels":
    from . import (
        assign_slots,
        buffer_attention,
        capped_attention,
        copy_rows,
        extend_attention,
        gather_rows,
        hidden_append,
        kv_append,
        kv_offload,
        kv_prefetch,
        kv_read,
        kv_recompute,
        kv_select,
        kv_wait,
        prefill_attention,
        quantize_row,
        scatter_rows,
        swa_attention,
    )

__all__ = [
    "assign_slots",
    "buffer_attention",
    "capped_attention",
    "copy_rows",
    "extend_attention",
    "gather_rows",
    "hidden_append",
    "kv_append",
    "kv_offload",
    "kv_prefetch",
    "kv_read",
    "kv_recompute",
    "kv_select",
    "kv_wait",
    "prefill_attention",
    "quantize_row",
    "scatter_rows",
    "swa_attention",
]
