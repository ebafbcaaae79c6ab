"""`alisa::kv_seed` and `alisa::kv_select`: scores and sets against recomputation from all past rows."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch

from alisa_compile.kernels.selection import SelectionSpec, decode_spec
from tests.kernels.harness import Driver, Heads, ops

Row = dict[int, float]
Draw = Callable[[int], torch.Tensor]


def _nearest(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


@dataclasses.dataclass
class Naive:
    """One sequence and head group: all attention rows ever seen, and the set chosen from them by sorting.

    `window` 0 sums the last `local` rows, else rows fade by 1 - 1 / window a token.
    """

    keep: Fraction
    window: int
    sinks: int
    local_fraction: Fraction = Fraction(1, 2)
    max_rows: int | None = None
    real: list[int] = dataclasses.field(default_factory=list)
    rows: list[Row] = dataclasses.field(default_factory=list)

    def sizes(self) -> tuple[int, int]:
        """Local rows and dynamic rows (sinks included) of the coming step, which counts the coming token."""
        tokens = len(self.real) + 1
        local = max(1, _nearest(tokens * self.keep * self.local_fraction))
        dynamic = max(1, _nearest(tokens * self.keep * (1 - self.local_fraction)))
        if self.max_rows is not None:
            cap = max(1, _nearest(self.max_rows * self.local_fraction))
            local, dynamic = min(local, cap), min(dynamic, self.max_rows - cap)
        local = min(local, tokens)
        return local, min(dynamic, tokens - local)

    def scores(self) -> dict[int, float]:
        """Score of each past position."""
        totals = dict.fromkeys(self.real, 0.0)
        local, _ = self.sizes()
        newest = len(self.rows) - 1
        for index, row in enumerate(self.rows):
            if self.window == 0 and newest - index >= local:
                continue
            weight = (1 - 1 / self.window) ** (newest - index) if self.window else 1.0
            for position, mass in row.items():
                totals[position] += weight * mass
        return totals

    def choose(self, coming: int) -> list[int]:
        """The working set of the step whose new token stands at position `coming`."""
        local, dynamic = self.sizes()
        past = [*self.real, coming]
        others = past[: len(past) - local]
        pinned = others[: min(self.sinks, dynamic)]
        scores = self.scores()
        ranked = sorted(others[len(pinned) :], key=lambda position: (scores[position], position), reverse=True)
        return sorted(pinned + ranked[: dynamic - len(pinned)] + past[len(past) - local :])


class SelectionRun:
    """Feeds made-up attention mass to the selection ops and to `Naive`, and compares sets after each call."""

    def __init__(self, draw: Draw, *, mask: torch.Tensor | None = None, layer: int = 0, **options: Any) -> None:
        self.driver = Driver(Heads(4, 2, 8), capacity=160, layers=2, batch=2, dtype=torch.float64, **options)
        self.store, self.draw, self.mask, self.layer = self.driver.store, draw, mask, layer
        assert self.store.selection is not None
        spec = self.store.selection
        config = self.store.config
        window = 0 if config.paper else config.window
        sinks = 0 if config.paper else config.sinks
        fraction = Fraction(1, 2) if config.paper else Fraction(str(config.local_fraction))
        cap = config.max_rows if isinstance(config.max_rows, int) else None
        assert spec.window == window
        self.naive = [
            [Naive(config.keep_ratio, window, sinks, fraction, cap) for _ in range(self.store.groups)] for _ in range(2)
        ]
        self.tokens = self.origin = 0

    def _is_real(self, sequence: int, position: int) -> bool:
        inside = self.mask is not None and position < self.mask.shape[1]
        return bool(self.mask[sequence, position]) if self.mask is not None and inside else True

    def _state(self, mass: torch.Tensor) -> tuple[Any, ...]:
        valid = None if self.mask is None else self.store.valid
        return self.store.scores, self.store.rows, self.store.counts, mass, self.store.length, self.store.origin, valid

    def _advance(self, tokens: int) -> None:
        if self.mask is not None:
            for position in range(self.tokens, self.tokens + tokens):
                for sequence in range(2):
                    self.store.valid[sequence, position] = self._is_real(sequence, position)
        self.tokens += tokens
        self.store.length.fill_(self.tokens)

    def seed(self, tokens: int) -> None:
        """A block: random rows over the real tokens up to each real query; the op gets the last ones only."""
        start = self.tokens
        if start == 0 or tokens > 16:
            self.origin = start + tokens
        self._advance(tokens)
        selection = decode_spec(self.store.spec)
        count = int(selection.seed_rows(tokens, self.store.capacity))
        mass = torch.zeros((2, self.store.groups, count, self.store.capacity), dtype=torch.float64)
        for sequence, groups in enumerate(self.naive):
            for group, naive in enumerate(groups):
                new = [p for p in range(start, self.tokens) if self._is_real(sequence, p)]
                for position in new:
                    naive.real.append(position)
                    values = self.draw(len(naive.real)).tolist()
                    naive.rows.append(dict(zip(naive.real, values, strict=True)))
                for back, row in enumerate(reversed(naive.rows[len(naive.rows) - len(new) :])):
                    if back < count:
                        mass[sequence, group, count - 1 - back, list(row)] = torch.tensor(list(row.values())).double()
        ops.kv_seed(*self._state(mass), tokens, self.layer, self.store.spec)
        self.check(tokens)
        assert self.store.origin is not None
        self.store.origin[0] = self.origin

    def step(self) -> None:
        """A decode step over the current working set; mass past the count, which means nothing, is NaN."""
        sets = [
            [self.driver.working_set(self.layer, sequence, group) for group in range(self.store.groups)]
            for sequence in range(2)
        ]
        self._advance(1)
        mass = torch.full((2, self.store.groups, self.store.capacity), float("nan"), dtype=torch.float64)
        for sequence, groups in enumerate(self.naive):
            for group, naive in enumerate(groups):
                naive.real.append(self.tokens - 1)
                chosen = sets[sequence][group]
                attended = naive.real if chosen is None else chosen
                values = self.draw(len(attended))
                naive.rows.append(dict(zip(attended, values.tolist(), strict=True)))
                if chosen is None:  # a dense step reports by position
                    mass[sequence, group, : self.tokens] = 0
                    mass[sequence, group, attended] = values
                else:
                    mass[sequence, group, : len(attended)] = values
        ops.kv_select(*self._state(mass), self.layer, self.store.spec)
        self.check()

    def check(self, tokens: int = 1) -> None:
        """Working set as chosen naively, unless a refresh is due at the coming step or was at one of the latest."""
        refresh = 0 if self.store.config.paper else self.store.config.refresh
        for sequence, groups in enumerate(self.naive):
            for group, naive in enumerate(groups):
                got = self.driver.working_set(self.layer, sequence, group)
                step = self.tokens + 1 - self.origin + self.layer
                late = min(tokens, self.tokens + 1 - self.origin)
                if refresh and any(due % refresh == 0 for due in range(step - late + 1, step + 1)):
                    assert got is None
                else:
                    assert got == naive.choose(self.tokens)


def _uniform(seed: int) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    return lambda count: torch.rand(count, generator=generator, dtype=torch.float64)


def _few_values(seed: int) -> Draw:
    """0, 1 or 2: sums are exact and equal scores abound."""
    generator = torch.Generator().manual_seed(seed)
    return lambda count: torch.randint(0, 3, (count,), generator=generator).double()


_LEFT = torch.tensor([[1] * 20, [0] * 13 + [1] * 7])
_HOLES = torch.tensor([[1] * 20, [1] + [0] * 12 + [1, 0, 1, 1, 0, 1, 1]])


@pytest.mark.parametrize("head_mode", ["shared", "per_kv_head"])
@pytest.mark.parametrize("mask", [None, _LEFT, _HOLES])
@pytest.mark.parametrize("layer", [0, 1])
def test_default_parameters_choose_the_naive_set(head_mode: str, mask: torch.Tensor | None, layer: int) -> None:
    """Locals, sinks, decayed scores and refresh steps, with padding, over 90 steps at the default options."""
    run = SelectionRun(_uniform(0), mask=mask, layer=layer, head_mode=head_mode)
    run.seed(20)
    for _ in range(90):
        run.step()


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.5, "local_fraction": 0.25, "sinks": 2, "window": 5, "refresh": 7},
        {"sparsity": 0.37, "local_fraction": 0.7, "sinks": 0, "window": 2, "refresh": 0},
        {"sparsity": 0.99, "sinks": 9, "refresh": 3},
        {"sparsity": 0.1, "max_rows": 9, "sinks": 3, "refresh": 0},
        {"sparsity": 0.5, "max_rows": 2, "sinks": 4, "refresh": 0},
    ],
)
def test_other_parameters_choose_the_naive_set(options: dict[str, Any]) -> None:
    """Each option does what its name says, alone and with the others; from a one-token prompt as well."""
    run = SelectionRun(_uniform(1), **options)
    run.seed(1)
    for _ in range(60):
        run.step()


@pytest.mark.parametrize("mask", [None, _LEFT, _HOLES])
def test_equal_scores_prefer_the_larger_position(mask: torch.Tensor | None) -> None:
    """Algorithm 1's plain sums of small integers: most cuts fall between equal scores."""
    run = SelectionRun(_few_values(2), mask=mask, paper=True, sparsity=0.5)
    run.seed(20)
    for _ in range(60):
        run.step()


def test_no_mass_at_all_keeps_the_latest_tokens() -> None:
    """With all scores equal the dynamic rows are those right before the locals."""
    run = SelectionRun(lambda count: torch.zeros(count, dtype=torch.float64), sparsity=0.5, sinks=2, refresh=0)
    run.seed(19)
    assert run.driver.working_set() == [0, 1, *range(12, 20)]


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_decayed_scores_over_many_rescales(window: int, dtype: torch.dtype) -> None:
    """The lazily scaled vector stays the naive decayed sum, and in range, past several times 16 windows."""
    spec = SelectionSpec(Fraction(1, 4), Fraction(1, 4), window=window).encode()
    capacity, steps, decay = 200, 40 * window, 1 - 1 / window
    generator = torch.Generator().manual_seed(3)
    scores = torch.zeros((1, 1, 1, 1, capacity), dtype=dtype)
    rows = torch.zeros((1, 1, 1, capacity), dtype=torch.int32)
    counts = torch.full((1, 1, 1), -1, dtype=torch.int32)
    length = torch.zeros(1, dtype=torch.int64)
    expected = torch.zeros(capacity, dtype=torch.float64)
    for tokens in range(1, steps + 1):
        length.fill_(tokens)
        counts.fill_(-1)  # dense steps: mass by position
        mass = torch.zeros((1, 1, capacity), dtype=dtype)
        mass[..., :tokens] = torch.rand(tokens, generator=generator, dtype=torch.float64)
        ops.kv_select(scores, rows, counts, mass, length, torch.zeros(2, dtype=torch.int64), None, 0, spec)
        expected = expected * decay + mass[0, 0].double()
        got = scores[0, 0, 0, 0].double()
        assert float(got.max()) < 2.0 ** (16 * window + 2)
        bound = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(got / got.sum(), expected / expected.sum(), rtol=bound, atol=bound**1.5)


@pytest.mark.parametrize("chunks", [[50], [7, 43], [1, 1, 48], [30, 20]])
def test_seeding_in_blocks_equals_one_row_at_a_time(chunks: list[int]) -> None:
    """`kv_seed` leaves scores proportional to those of row-by-row decay, whatever the block boundaries."""
    window, capacity = 3, 80
    spec = SelectionSpec(Fraction(1, 4), Fraction(1, 4), window=window).encode()
    generator = torch.Generator().manual_seed(4)
    every = torch.rand((50, capacity), generator=generator, dtype=torch.float64).tril()
    expected = torch.zeros(capacity, dtype=torch.float64)
    for row in every:
        expected = expected * (1 - 1 / window) + row
    scores = torch.zeros((1, 1, 1, 1, capacity), dtype=torch.float64)
    rows = torch.zeros((1, 1, 1, capacity), dtype=torch.int32)
    counts = torch.full((1, 1, 1), -1, dtype=torch.int32)
    length = torch.zeros(1, dtype=torch.int64)
    for tokens in chunks:
        length += tokens
        end = int(length)
        used = min(4 * window, tokens)
        mass = every[end - used : end][None, None]
        ops.kv_seed(scores, rows, counts, mass, length, torch.zeros(2, dtype=torch.int64), None, tokens, 0, spec)
    got = scores[0, 0, 0, 0]
    # Rows older than four windows of a block are left out by design: at most decay ** 12 of the whole.
    torch.testing.assert_close(got / got.sum(), expected / expected.sum(), rtol=0, atol=(2 / 3) ** 12)


def test_sinks_are_kept_though_nothing_attends_to_them() -> None:
    """The first real tokens stay in every set with hardly any mass, after left padding too."""

    def late(count: int) -> torch.Tensor:
        return torch.arange(count, dtype=torch.float64) ** 2

    run = SelectionRun(late, mask=_LEFT, sparsity=0.5, sinks=3, refresh=0)
    run.seed(20)
    for _ in range(30):
        run.step()
        for sequence, first in ((0, 0), (1, 13)):
            chosen = run.driver.working_set(0, sequence)
            assert chosen is not None
            pinned = min(3, len(chosen) // 2)  # they count inside the dynamic half
            assert chosen[:pinned] == [first, first + 1, first + 2][:pinned]


@pytest.mark.parametrize("max_rows", [2, 5, 12])
@pytest.mark.parametrize("local_fraction", [0.1, 0.5, 0.9])
def test_max_rows_caps_every_step_but_refreshes(max_rows: int, local_fraction: float) -> None:
    """Once the context is long the set has exactly `max_rows` rows, and never more; storage is no wider."""
    options = {"sparsity": 0.5, "max_rows": max_rows, "local_fraction": local_fraction, "refresh": 0}
    run = SelectionRun(_uniform(5), **options)
    assert run.store.rows is not None and run.store.rows.shape[-1] <= max_rows
    run.seed(10)
    for _ in range(70):
        run.step()
        chosen = run.driver.working_set()
        assert chosen is not None and len(chosen) <= max_rows
    assert len(run.driver.working_set() or []) == max_rows


def test_spec_survives_its_string_form() -> None:
    """What a graph carries decodes to the same exact numbers."""
    spec = SelectionSpec(Fraction(63, 200), Fraction(1, 7), window=9, sinks=3, refresh=11, max_rows=77)
    assert decode_spec(spec.encode()) == spec


def _run_policy(policy: str, sparsity: float, padding: int, steps: int = 40, **options: Any) -> list[list[int]]:
    """Working sets of one sequence over a prompt of 12 tokens and `steps` steps, in ranks of real tokens."""
    store = Driver(Heads(4, 2, 8), capacity=120, dtype=torch.float64, policy=policy, sparsity=sparsity, **options).store
    assert store.selection is not None and store.rows is not None and store.counts is not None
    generator = torch.Generator().manual_seed(7)
    store.valid[0, :padding] = False
    sets: list[list[int]] = []
    received = torch.zeros(120, dtype=torch.float64)  # by rank
    for step in range(steps + 1):
        new = 1 if step else 12 + padding
        store.length += new
        real = int(store.length[0]) - padding
        if step:
            row = torch.rand(len(sets[-1]), generator=generator, dtype=torch.float64)
            mass = torch.full((1, 1, 120), float("nan"), dtype=torch.float64)
            mass[0, 0, : len(row)] = row
            received[sets[-1]] += row
        else:
            rows = torch.rand((12, 12), generator=generator, dtype=torch.float64).tril()
            received[:12] += rows.sum(0)
            seeds = int(store.selection.seed_rows(new))
            mass = torch.zeros((1, 1, seeds, new), dtype=torch.float64)
            if seeds:
                mass[0, 0, :, padding:] = rows.sum(0) if policy == "h2o" else rows[-seeds:]
        valid = store.valid if padding else None
        state = (store.scores, store.rows, store.counts, mass, store.length, store.origin, valid)
        if step:
            ops.kv_select(*state, 0, store.spec)
        else:
            ops.kv_seed(*state, new, 0, store.spec)
        count = int(store.counts[0, 0, 0])
        chosen = [position - padding for position in store.rows[0, 0, 0, :count].tolist()]
        assert chosen[-1] == real and chosen == sorted(set(chosen)) and chosen[0] >= 0
        if policy == "h2o" and "max_rows" not in options:
            _check_heavy_hitters(chosen, sets, received, real, sparsity)
        sets.append(chosen)
    return sets


def _check_heavy_hitters(
    chosen: list[int], earlier: list[list[int]], received: torch.Tensor, real: int, sparsity: float
) -> None:
    half = max(1, _nearest((real + 1) * (1 - Fraction(str(sparsity))) / 2))
    available = earlier[-1] if earlier else range(real)
    others = sorted((p for p in available if p <= real - half), key=lambda p: (float(received[p]), p), reverse=True)
    assert chosen == sorted([*others[:half], *range(real + 1 - half, real + 1)])


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
def test_local_keeps_the_most_recent(sparsity: float, padding: int) -> None:
    """r x n of them, the coming token included."""
    for tokens, chosen in enumerate(_run_policy("local", sparsity, padding), start=13):
        kept = max(1, _nearest(tokens * (1 - Fraction(str(sparsity)))))
        assert chosen == list(range(tokens - kept, tokens))


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("sparsity", [0.4, 0.5, 0.8, 0.9])
def test_strided_counts_from_position_zero(sparsity: float, padding: int) -> None:
    """Every 1 / r-th real token; padding is no position."""
    share = 1 - Fraction(str(sparsity))
    for tokens, chosen in enumerate(_run_policy("strided", sparsity, padding), start=13):
        steps_up = [p for p in range(tokens - 1) if p == 0 or math.floor(p * share) > math.floor((p - 1) * share)]
        assert chosen == [*steps_up, tokens - 1]


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_h2o_never_takes_a_row_back(sparsity: float, padding: int) -> None:
    """The heavy hitters of what is left (checked in every step), from all attention rows of the prompt on."""
    sets = _run_policy("h2o", sparsity, padding)
    dropped: set[int] = set()
    for before, after in itertools.pairwise(sets):
        dropped |= set(before) - set(after)
        assert not dropped & set(after)
    assert len(dropped) > 3


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_churn_rotates(sparsity: float, padding: int) -> None:
    """At least a tenth of its rows each step on average, whatever the padding."""
    sets = _run_policy("churn", sparsity, padding)
    assert sets == _run_policy("churn", sparsity, 0)
    moved = [len(set(after) - set(before)) / len(after) for before, after in itertools.pairwise(sets)]
    assert sum(moved) / len(moved) > 0.1


@pytest.mark.parametrize("policy", ["local", "strided", "h2o", "churn"])
def test_caps_hold_for_every_policy(policy: str) -> None:
    """`max_rows` is never passed, and storage is no wider."""
    for chosen in _run_policy(policy, 0.5, 0, max_rows=7):
        assert len(chosen) <= 7
