"""`alisa diff --explain`: what to do about each reason in the skip list."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from ..passes.record import GraphRecord

_UPDATE_ONCE = "call cache.update(key, value, layer_idx) once for each layer and step, and attend to what it returns"
_OWN_FORMULA = (
    "nothing is wrong: this model's attention is not softmax(scale QK + mask) V, which is all that alisa's kernels "
    "compute, so it stays dense; where the model has it, attn_implementation='sdpa' may help"
)
_ONE_DTYPE = "load the model in one dtype, and with attn_implementation='sdpa' where it has that"
_PLAIN_MASK = (
    "alisa needs a mask that it can prove causal plus padding: let transformers build it from the [B, T] "
    "attention_mask of the tokenizer; for a mask of your own, compare positions of keys and queries with <="
)
_NO_GRADIENTS = "call the model under torch.no_grad() or torch.inference_mode()"
_NOT_ITS_JOB = "nothing to do: alisa manages the cache of causal self-attention alone, this stays dense and exact"

# Reason -> advice, the first that fits.
_ADVICE: tuple[tuple[str, str], ...] = (
    (r"out of fuel", "unset ALISA_FUEL, or raise it"),
    (r"switched off: ", "unset TORCHINDUCTOR_DISABLED_PASSES"),
    (r"gradients are enabled", _NO_GRADIENTS),
    (r"it uses dropout", "call model.eval() first"),
    (r"its mask was prepared outside", "give the [B, T] attention_mask of the tokenizer instead of a 4-D mask"),
    (r".*\(output_attentions\)", "leave out output_attentions=True: fused attention has no weights to return"),
    (r"its K and V do not come from|its \w+ is neither|its \w+ is an input that this graph does not write to|"
     r"its K and V are no values of the graph",
     "generate with the compiled model itself, or pass an AlisaCache as past_key_values; a module of your own has to "
     "keep K and V in [B, H, N, D] buffers that it writes in its forward"),
    (r"its \w+ buffer is not of a fixed", "make the buffer [B, H, N, D], with sizes that are plain numbers"),
    (r"sparsity is 0", "nothing to do; to leave rows out, set sparsity above 0"),
    (r"it fills a static buffer", "nothing to do: this is the prompt; steps of one token are rewritten"),
    (r"another layer attends to its rows", "nothing to do: of layers that share K and V the first one selects"),
    (r"it is not causal|its query is not the new tokens'|no layer of .* is plain full attention", _NOT_ITS_JOB),
    (r"its K and V are swapped|its K and V come from different|nothing appends to|its layer of the cache is appended",
     _UPDATE_ONCE),
    (r"query, key and value are not positional", "call scaled_dot_product_attention(query, key, value, ...) so"),
    (r"its scale is computed in the graph", "make the scale a plain number"),
    (r"is_causal on a single query", "leave out is_causal for a single query: it would see the first position only"),
    (r"it has no mask although", "give a mask: several new tokens after a history need one"),
    (r"it combines a mask with is_causal", "give either the mask or is_causal=True"),
    (r".* is written to|the graph writes to .*, which it attends with|its K or V is written to",
     "do not change K and V in place after they are stored: work on a copy"),
    (r"its mask (is additive|has shape)", "give a boolean mask of shape [B, 1, 1, N], True where to attend"),
    (r"its (softmax is taken|query, K, V and output)|it (converts|rounds) ", _ONE_DTYPE),
    (r"its (padding )?mask|the graph writes to .*, which its mask|something else than one mask", _PLAIN_MASK),
    (r"attention sinks|a bias is added|more than a mask|its scores|its products|its softmax|its query",
     _OWN_FORMULA),
    (r"what the model does with its K and V|the passes found no attention", _OWN_FORMULA),
    (r"its K or V also depends|its K depends", "set recompute='off': K and V of this layer cannot be made again"),
)  # fmt: skip


def advice(reason: str) -> str:
    """What to do about a reason of the skip list; empty if nothing is known."""
    return next((text for pattern, text in _ADVICE if re.match(pattern, reason)), "")


def explain(records: Sequence[GraphRecord], width: int = 100) -> str:
    """The skip lists of several graphs, one paragraph a reason."""
    found: dict[str, list[str]] = {}
    for record in records:
        for row in record.skipped:
            place = f"{record.stage} graph, {'' if row.layer is None else f'layer {row.layer}, '}{row.node}"
            found.setdefault(row.reason, []).append(place)
    if not found:
        stages = " and ".join(dict.fromkeys(record.stage for record in records))
        return f"nothing was left as it is in the {stages} graphs: every attention was rewritten\n"
    lines = []
    for reason, places in found.items():
        lines.append(f"{reason}\n")
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        lines.append(textwrap.indent(textwrap.fill("; ".join(places[:3]) + more, width - 4), "    ") + "\n")
        text = advice(reason) or "please report this with the model's class"
        lines.append(textwrap.indent(textwrap.fill(f"-> {text}", width - 4), "    ") + "\n")
    return "".join(lines)
