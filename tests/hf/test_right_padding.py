"""Right-padded prompts: a padded query sees the real tokens before it, as in stock transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import compiled, left_padded, tiny_model


@pytest.mark.parametrize("family", ["llama", "opt", "neox"])
def test_logits_of_a_right_padded_batch(family: str) -> None:
    """Every logit, prefill and decode, those computed from padding included."""
    stock = tiny_model(family)
    ids, mask = left_padded(3, 14)
    ids, mask = ids.flip(1), mask.flip(1)

    def logits(model: Any) -> torch.Tensor:
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        return torch.stack(out.logits)

    torch.testing.assert_close(logits(compiled(stock, inner="eager", sparsity=0.0)), logits(stock), rtol=0, atol=1e-4)
