"""A plain module with K/V buffers of its own: sparse decode without any cache class of ours."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alisa_compile.backend import alisa
from tests.support import recorded_compiles

DIM, HEADS, KV_HEADS, HEAD_DIM, CAPACITY = 32, 4, 2, 8, 96


class BufferAttention(nn.Module):
    """Self-attention over static buffers, as small inference codes write it."""

    def __init__(self, additive: bool = False) -> None:
        super().__init__()
        self.additive = additive
        self.query, self.key, self.value = nn.Linear(DIM, DIM), nn.Linear(DIM, 16), nn.Linear(DIM, 16)
        self.register_buffer("k", torch.zeros(1, KV_HEADS, CAPACITY, HEAD_DIM))
        self.register_buffer("v", torch.zeros(1, KV_HEADS, CAPACITY, HEAD_DIM))
        self.register_buffer("causal", torch.ones(CAPACITY, CAPACITY, dtype=torch.bool).tril())

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[1]
        query = self.query(x).view(1, tokens, HEADS, HEAD_DIM).transpose(1, 2)
        self.k[:, :, positions] = self.key(x).view(1, tokens, KV_HEADS, HEAD_DIM).transpose(1, 2)
        self.v[:, :, positions] = self.value(x).view(1, tokens, KV_HEADS, HEAD_DIM).transpose(1, 2)
        mask = self.causal[None, None, positions]
        if self.additive:
            mask = torch.where(mask, 0.0, float("-inf"))
        out = F.scaled_dot_product_attention(query, self.k, self.v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).reshape(1, tokens, DIM)


@torch.no_grad()
def _differences(model: nn.Module, compiled: nn.Module, prompt: int, steps: int) -> list[float]:
    """Largest differences of the prompt and of each step; both models see the same inputs."""
    found = []
    for start, tokens in [(0, prompt)] + [(prompt + step, 1) for step in range(steps)]:
        x, positions = torch.randn(1, tokens, DIM), torch.arange(start, start + tokens)
        found.append(float((model(x, positions) - compiled(x, positions)).abs().max()))
    return found


def _pair(inner: str, additive: bool = False, **options: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = BufferAttention(additive).eval()
    return model, torch.compile(copy.deepcopy(model), backend=alisa, options={"inner_compiler": inner, **options})


@pytest.mark.parametrize("inner", ("aot_eager", "inductor"))
def test_keeping_every_row_equals_dense(inner: str) -> None:
    """Selection that leaves nothing out changes nothing, over two prompts on the same buffers."""
    model, compiled = _pair(inner, sparsity=1e-9, local_fraction=0.6)
    with recorded_compiles() as rows:
        for _ in range(2):
            assert max(_differences(model, compiled, prompt=40, steps=30)) < 1e-6
    assert [row.rewritten for row in rows] == [0, 1]
    assert [skip.reason for row in rows for skip in row.skipped] == [
        "it fills a static buffer with several tokens, which is dense at any sparsity"
    ]


def test_a_new_prompt_voids_the_scores() -> None:
    """After a prompt the first step is dense again, the ones after it are sparse."""
    model, compiled = _pair("aot_eager", sparsity=0.8)
    for _ in range(2):
        prompt, first, *others = _differences(model, compiled, prompt=40, steps=12)
        assert prompt < 1e-6 and first < 1e-6
        assert min(others) > 1e-4


def test_refresh_steps_are_dense() -> None:
    """Every `refresh`-th row is attended densely."""
    model, compiled = _pair("aot_eager", sparsity=0.8, refresh=4)
    steps = _differences(model, compiled, prompt=40, steps=13)[1:]
    assert [index for index, difference in enumerate(steps) if difference < 1e-6] == [0, 4, 8, 12]


@pytest.mark.parametrize(
    ("options", "additive", "reason"),
    (
        ({"sparsity": 0.0}, False, "sparsity is 0"),
        ({"sparsity": 0.8}, True, "its mask is additive"),
    ),
)
def test_refusals(options: dict[str, object], additive: bool, reason: str) -> None:
    """What does not apply stays dense, exactly, with its reason."""
    model, compiled = _pair("aot_eager", additive, **options)
    with recorded_compiles() as rows:
        assert max(_differences(model, compiled, prompt=20, steps=5)) < 1e-6
    assert all(row.rewritten == 0 for row in rows)
    assert reason in rows[-1].skipped[0].reason


def test_inputs_that_the_graph_does_not_write_are_left_alone() -> None:
    """K and V handed in from outside (cross attention) are no cache."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    compiled = torch.compile(attend, backend=alisa, options={"inner_compiler": "aot_eager"})
    operands = [torch.randn(1, 2, size, 8) for size in (1, 16, 16)]
    with torch.no_grad(), recorded_compiles() as rows:
        assert torch.allclose(compiled(*operands), attend(*operands), atol=1e-6)
    assert "does not write to" in rows[0].skipped[0].reason
