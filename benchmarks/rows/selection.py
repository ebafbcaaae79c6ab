"""What scores and selection cost a layer in a step."""

from __future__ import annotations

from typing import Any

import torch

import alisa_compile  # noqa: F401  (registers the ops)
from alisa_compile.config import AlisaConfig
from alisa_compile.kernels import kv_select, native
from alisa_compile.runtime.policies import selection_spec
from benchmarks.decode_attention import Bandwidth, cache_bytes
from benchmarks.outcome import GateFailed, Measure, Outcome, floor_ms
from benchmarks.timing import alternate


class _State:
    """Arguments of `alisa::kv_select` after `tokens` tokens, between two refreshes."""

    def __init__(self, tokens: int, batch: int, sparsity: float) -> None:
        config = AlisaConfig(sparsity=sparsity)
        spec = selection_spec(config)
        assert spec is not None
        generator = torch.Generator().manual_seed(0)
        self.spec, self.tokens = spec.encode(), tokens
        width = spec.rows_capacity(tokens + 1)
        self.scores = torch.rand((1, batch, 1, 1, tokens), generator=generator)
        self.rows = torch.zeros((1, batch, 1, width), dtype=torch.int32)
        self.counts = torch.zeros((1, batch, 1), dtype=torch.int32)
        self.length = torch.tensor([tokens])
        # So that neither this step nor the next one refreshes layer 0.
        self.origin = torch.tensor([tokens - 1, 0])
        kv_select.reference.choose(self.scores, self.rows, self.counts, tokens - 1, None, 0, spec)
        self.dynamic = int(spec.dynamic_rows(tokens + 1))
        self.mass = torch.zeros((batch, 1, tokens))
        attended = torch.rand((batch, 1, int(self.counts.max())), generator=generator)
        self.mass[..., : attended.shape[-1]] = attended / attended.sum(-1, keepdim=True)

    def copy(self) -> _State:
        """For a call whose results are compared."""
        other = object.__new__(_State)
        vars(other).update(
            {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in vars(self).items()}
        )
        return other

    def run(self, op: Any) -> None:
        """One step's selection, in place."""
        op(self.scores, self.rows, self.counts, self.mass, self.length, self.origin, None, 0, self.spec)

    def topk(self) -> torch.Tensor:
        """What torch needs for the ranking alone: no scores updated, no index list sorted."""
        return self.scores[0, :, 0, 0].topk(self.dynamic).indices


def _check(state: _State, op: Any) -> None:
    found, expected = state.copy(), state.copy()
    found.run(op)
    expected.run(kv_select.reference.kv_select)
    if not torch.equal(found.counts, expected.counts):
        raise GateFailed(f"counts {found.counts.tolist()}, the reference has {expected.counts.tolist()}")
    for sequence, count in enumerate(expected.counts[0, :, 0].tolist()):
        if not torch.equal(found.rows[0, sequence, 0, :count], expected.rows[0, sequence, 0, :count]):
            raise GateFailed(f"sequence {sequence} keeps other rows than in the reference")
    try:
        torch.testing.assert_close(found.scores, expected.scores)
    except AssertionError as error:
        raise GateFailed("scores differ from the reference: " + " ".join(str(error).split())) from None


@torch.no_grad()
def select(tokens: int, batch: int, sparsity: float, seconds: float = 0.5) -> Outcome:
    """Scores are in the processor's cache or not, as they fit: a step has touched them one step before."""
    native.register_native()
    state = _State(tokens, batch, sparsity)
    op = torch.ops.alisa.kv_select.default
    _check(state, op)
    bandwidth = Bandwidth(cache_bytes() if seconds > 0.1 else 1 << 20).measure()
    times = alternate({"alisa::kv_select": lambda: state.run(op), "torch.topk alone": state.topk}, seconds=seconds)
    nbytes = state.scores.nbytes + state.mass.nbytes // 5
    return Outcome(
        [Measure(who, found, bytes=nbytes, floor_ms=floor_ms(nbytes, bandwidth)) for who, found in times.items()]
    )
