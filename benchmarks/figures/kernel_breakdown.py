"""Figure 11: the parts of one attention module's decode step, by sparsity: alisa's kernels and plain torch.

The paper's shapes: batch 64, context 128, heads and widths of OPT-6.7B and OPT-30B. Plain torch does what the paper
describes, one operation after the other.
"""

from __future__ import annotations

from typing import Any

import torch

from alisa_compile.config import AlisaConfig
from alisa_compile.kernels import kv_select, native
from alisa_compile.runtime.policies import selection_spec
from benchmarks.figures.drawing import Figure
from benchmarks.timing import alternate

_SHAPES = {"OPT-6.7B": (32, 128), "OPT-30B": (56, 128)}
_SPARSITIES = (0.0, 0.4, 0.6, 0.8)
_PARTS = ("gather", "QK", "softmax", "local sum", "AV", "append", "attention", "select")


class _Module:
    """One layer's state between two steps of `batch` sequences, in bf16."""

    def __init__(self, heads: int, width: int, batch: int, tokens: int, sparsity: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.heads, self.width, self.batch, self.tokens = heads, width, batch, tokens
        capacity = tokens + 1  # selection is for the coming step, whose own token is always among the chosen ones
        self.pool = torch.randn((batch * capacity, 2, heads, width), generator=generator).bfloat16()
        self.table = torch.arange(batch * capacity, dtype=torch.int32).view(1, batch, 1, capacity)
        self.length, self.valid = torch.tensor([tokens]), torch.ones((batch, capacity), dtype=torch.bool)
        self.before = torch.tensor([tokens - 1])
        self.query = torch.randn((batch, heads, 1, width), generator=generator).bfloat16()
        spec = selection_spec(AlisaConfig(sparsity=sparsity, refresh=0))
        self.spec = None if spec is None else spec.encode()
        self.scores = torch.rand((1, batch, 1, 1, capacity), generator=generator)
        self.rows = self.counts = None
        self.kept = torch.arange(tokens).expand(batch, tokens)
        if spec is not None:
            self.rows = torch.zeros((1, batch, 1, spec.rows_capacity(capacity)), dtype=torch.int32)
            self.counts = torch.zeros((1, batch, 1), dtype=torch.int32)
            kv_select.reference.choose(self.scores, self.rows, self.counts, tokens - 1, None, 0, spec)
            self.kept = self.rows[0, :, 0, : int(self.counts.max())].long()
        self.origin, self.scale = torch.tensor([tokens - 1, 0]), width**-0.5

    def calls(self) -> dict[str, Any]:
        """Every part, on its own."""
        ops = torch.ops.alisa
        heads, width, batch = self.heads, self.width, self.batch
        new = torch.randn(batch, heads, 1, width).bfloat16()
        _, mass = self._attend()
        packed = self._gather()
        logits = self._logits(packed)
        weights = logits.softmax(-1)
        window = torch.rand(batch, heads, 8, self.kept.shape[1]).bfloat16()

        def append() -> None:
            self.length.copy_(self.before)
            ops.kv_append.default(self.pool, None, self.table, self.length, self.valid, new, new, None, None, None, 0)

        calls = {
            "gather": self._gather,
            "QK": lambda: self._logits(packed),
            "softmax": lambda: logits.softmax(-1),
            "local sum": lambda: window.sum((1, 2)),
            "AV": lambda: weights @ packed[:, :, 1].transpose(1, 2),
            "append": append,
            "attention": self._attend,
        }
        if self.spec is not None:
            calls["select"] = lambda: ops.kv_select.default(
                self.scores, self.rows, self.counts, mass, self.length, self.origin, None, 0, self.spec
            )
        return calls

    def _attend(self) -> Any:
        return torch.ops.alisa.swa_attention.default(
            self.query, self.pool, None, self.table, self.length, None, self.rows, self.counts, 0, self.scale
        )

    def _gather(self) -> torch.Tensor:
        slots = self.table[0, :, 0].long().gather(1, self.kept)
        return self.pool[slots]

    def _logits(self, packed: torch.Tensor) -> torch.Tensor:
        return (self.query * self.scale) @ packed[:, :, 0].permute(0, 2, 3, 1)

    def check(self) -> None:
        """The parts in plain torch make the kernel's output."""
        packed = self._gather()
        out, _ = self._attend()
        expected = self._logits(packed).softmax(-1) @ packed[:, :, 1].transpose(1, 2)
        torch.testing.assert_close(out.float(), expected.float(), rtol=2e-2, atol=2e-2)


@torch.no_grad()
def make(*, small: bool = False) -> Figure:
    """Median milliseconds of each part."""
    native.register_native()
    batch, tokens, seconds = (2, 32, 0.05) if small else (64, 128, 0.3)
    rows: list[list[Any]] = []
    for name, (heads, width) in _SHAPES.items():
        for sparsity in _SPARSITIES:
            module = _Module(*((4, 16) if small else (heads, width)), batch, tokens, sparsity)
            module.check()
            times = alternate(module.calls(), seconds=seconds)
            parts = [times[part].p50 if part in times else 0.0 for part in _PARTS]
            rows.append([f"{name}, {sparsity:.0%}", *parts, sum(parts[:5]), sum(parts[5:])])

    def draw(axes: Any) -> None:
        places = range(len(rows))
        for first, last, offset in ((0, 5, -0.2), (5, len(_PARTS), 0.2)):
            bottom = [0.0] * len(rows)
            for part in range(first, last):
                values = [row[1 + part] for row in rows]
                side = "torch" if first == 0 else "alisa"
                axes.bar([p + offset for p in places], values, 0.38, bottom, label=f"{side}: {_PARTS[part]}")
                bottom = [low + value for low, value in zip(bottom, values, strict=True)]
        axes.set_xticks(places, [row[0] for row in rows], rotation=30, fontsize=7, ha="right")
        axes.set(ylabel="ms")
        axes.legend(fontsize=7, ncols=2)

    title = f"parts of one attention module's decode step, ms; batch {batch}, context {tokens}, bf16"
    return Figure(title, ["shape, sparsity", *_PARTS, "torch, sum", "alisa, sum"], rows, draw, (9.0, 4.5))
