"""The C++ kernel of a prompt's attention mass against `last_rows_mass` in float64."""

from __future__ import annotations

import pytest
import torch

from alisa_compile.kernels import prefill_attention
from tests.kernels.harness import Heads, ops, random_block, torch_threads

pytestmark = pytest.mark.usefixtures("built")

last_rows_mass = prefill_attention.reference.last_rows_mass

_CASES = [
    # heads, length, rows, start
    (Heads(4, 4, 8), 1, 1, 0),
    (Heads(4, 2, 64), 63, 32, 0),
    (Heads(6, 1, 40), 111, 7, 0),
    (Heads(7, 1, 80), 130, 130, 0),
    (Heads(8, 2, 5), 20, 12, 100),
    (Heads(3, 3, 1000), 33, 5, 3),
]


def _prompt(
    heads: Heads, length: int, start: int, dtype: torch.dtype, batch: int = 3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of the last `length` of `start + length` tokens, all keys, and which tokens are real.

    The second sequence is left padded, the third has holes and, of a short prompt, fewer real queries than rows.
    """
    generator = torch.Generator().manual_seed(length)
    query, key, _ = random_block(generator, heads, start + length, batch=batch, dtype=dtype).layer(0)
    valid = torch.ones((batch, start + length), dtype=torch.bool)
    valid[1, : start + length // 3] = False
    valid[2, :-1:3] = False
    return query[:, :, start:], key, valid


def test_the_kernel_serves_cpu_tensors() -> None:
    """Otherwise every comparison below would compare the reference with itself."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key("alisa::prefill_mass", "CPU")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_mass_is_the_references_in_float64(dtype: torch.dtype, masked: bool) -> None:
    """Odd shapes, groups of heads, blocks on a history, fewer real queries than rows."""
    close = 1e-12 if dtype == torch.float64 else 2e-6
    for heads, length, rows, start in _CASES:
        query, key, valid = _prompt(heads, length, start, dtype)
        given = valid if masked else None
        for groups in {1, heads.kv}:
            mass = ops.prefill_mass(query, key, given, groups, rows, start, heads.scale)
            expected = last_rows_mass(
                query.double(), key.double(), given, groups, rows, query_start=start, scale=heads.scale
            )
            assert mass.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(mass.double(), expected, rtol=1e2 * close, atol=close)


def test_keys_that_nobody_attends_to_may_hold_nan() -> None:
    """Padding, and what comes after a query."""
    heads = Heads(4, 2, 16)
    query, key, valid = _prompt(heads, 50, 0, torch.float32)
    expected = ops.prefill_mass(query, key, valid, 1, 9, 0, heads.scale)
    key = key.clone()
    key[1, :, :16] = float("nan")  # left padding; the holes of the third sequence are queries of their own
    assert torch.equal(ops.prefill_mass(query, key, valid, 1, 9, 0, heads.scale), expected)
    key[0, :, 45] = float("nan")
    mass = ops.prefill_mass(query, key, valid, 1, 9, 0, heads.scale)
    assert torch.equal(mass[0, :, :4], expected[0, :, :4]) and mass[0, :, 4:, :46].isnan().all()


def test_large_logits_do_not_overflow() -> None:
    """Logits of thousands leave the weight on the largest."""
    heads = Heads(4, 2, 16)
    query, key, _ = _prompt(heads, 70, 0, torch.float32)
    mass = ops.prefill_mass(query, key, None, 1, 5, 0, 1000.0)
    expected = last_rows_mass(query.double(), key.double(), None, 1, 5, query_start=0, scale=1000.0)
    torch.testing.assert_close(mass.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    """On a prompt that is large enough to be shared between threads, and whose rows take several blocks."""
    heads = Heads(32, 4, 64)
    query, key, valid = _prompt(heads, 1500, 0, dtype)
    with torch_threads(1):
        expected = ops.prefill_mass(query, key, valid, 2, 40, 0, heads.scale)
    exact = last_rows_mass(query.double(), key.double(), valid, 2, 40, query_start=0, scale=heads.scale)
    torch.testing.assert_close(expected.double(), exact, rtol=2e-4, atol=2e-6)
    for count in (2, 3):
        with torch_threads(count):
            assert torch.equal(ops.prefill_mass(query, key, valid, 2, 40, 0, heads.scale), expected)


def test_a_prompt_goes_through_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prefill_attention` takes its mass from the op, whatever the layout of the keys."""
    heads = Heads(4, 2, 16)
    query, key, _ = _prompt(heads, 30, 0, torch.float32)
    spec = "local=1/4,dynamic=1/4,rank=decay,window=2,sinks=0,refresh=0,max_rows=0"
    expected = last_rows_mass(query, key, None, 1, 8, query_start=0, scale=heads.scale)
    monkeypatch.setattr(prefill_attention.reference, "last_rows_mass", lambda *args, **_: pytest.fail("the reference"))
    for layout in (key, key.transpose(2, 3).contiguous().transpose(2, 3)):
        _, mass = ops.prefill_attention(query, layout, layout, None, 1, spec, heads.scale)
        torch.testing.assert_close(mass, expected, rtol=1e-5, atol=1e-6)


def test_what_does_not_belong_together_is_refused() -> None:
    """Instead of reading past the end."""
    heads = Heads(4, 2, 16)
    query, key, valid = _prompt(heads, 30, 0, torch.float32)
    for given, wrong, mask, rows, start, message in (
        (query, key[..., :8], None, 4, 0, "belong together"),
        (query, key.double(), None, 4, 0, "belong together"),
        (query, key, None, 31, 0, "more rows"),
        (query, key, None, 4, 1, "more rows"),
        (query, key, valid[:, :20].contiguous(), 4, 0, "mask is shorter"),
        (query, key[..., ::2], None, 4, 0, "belong together"),
        (query[..., ::2], key[..., ::2], None, 4, 0, "lie together"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.prefill_mass(given, wrong, mask, 1, rows, start, heads.scale)


def test_opcheck() -> None:
    """Schema, shape function, AOT."""
    heads = Heads(4, 2, 16)
    query, key, valid = _prompt(heads, 30, 0, torch.float32)
    for mask in (None, valid):
        results = torch.library.opcheck(ops.prefill_mass.default, (query, key, mask, 2, 6, 0, heads.scale))
        assert set(results.values()) == {"SUCCESS"}, results
