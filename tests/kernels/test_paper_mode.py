"""Paper mode of the ops, driven through a store, against the NumPy loops of Algorithm 1 at every step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.algorithm1 import Sequence, half_budget
from tests.kernels.harness import Block, Driver, Heads, random_block

_BOUND = {torch.float32: 1e-5, torch.float64: 1e-12}


class Comparison:
    """A store and one `Sequence` per layer and sequence, fed the same random tokens.

    The loops continue with the op's own working set once it has been checked, so one near tie that rounding
    decided otherwise does not spread. exact: no such excuse, sets must be equal.
    """

    def __init__(
        self,
        heads: Heads,
        sparsity: float,
        *,
        layers: int = 1,
        batch: int = 1,
        capacity: int = 8,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        exact: bool = False,
    ) -> None:
        self.driver = Driver(
            heads, capacity=capacity, layers=layers, batch=batch, dtype=dtype, paper=True, sparsity=sparsity
        )
        self.truth = [[Sequence(sparsity, heads.scale) for _ in range(batch)] for _ in range(layers)]
        self.generator = torch.Generator().manual_seed(seed)
        self.layers, self.batch, self.dtype, self.exact = layers, batch, dtype, exact
        self.real: torch.Tensor = torch.ones((batch, 0), dtype=torch.int64)

    @property
    def tokens(self) -> int:
        """Positions used so far, padding included."""
        return self.real.shape[1]

    def forward(self, tokens: int, real: torch.Tensor | None = None) -> None:
        """One forward pass. real: `[B, tokens]`, 0 = padding; None = all real, without a mask if possible."""
        own = torch.ones((self.batch, tokens), dtype=torch.int64) if real is None else real
        self.driver.store.reserve(self.tokens + tokens)
        block = random_block(
            self.generator,
            self.driver.heads,
            tokens,
            layers=self.layers,
            batch=self.batch,
            dtype=self.dtype,
        )
        is_decode = tokens == 1 and self.driver.store.has_history
        sets = self._working_sets() if is_decode else {}
        self.real = torch.cat([self.real, own], dim=1)
        mask = self.real if real is not None or not bool(self.real.all()) else None
        out = self.driver.forward(block, mask).double().numpy()
        for layer in range(self.layers):
            for sequence in range(self.batch):
                place = (layer, sequence)
                mine = np.flatnonzero(own[sequence].numpy())
                expected = self._expected(place, block, mine, sets.get(place))
                got = out[layer, sequence][:, mine].transpose(1, 0, 2)
                np.testing.assert_allclose(got, expected, rtol=0, atol=_BOUND[self.dtype])

    def _working_sets(self) -> dict[tuple[int, int], list[int]]:
        sets = {}
        for layer in range(self.layers):
            for sequence in range(self.batch):
                chosen = self.driver.working_set(layer, sequence)
                assert chosen is not None, "paper mode never attends to everything"
                assert chosen == sorted(chosen), "positions are in ascending order"
                sets[layer, sequence] = chosen
        return sets

    def _expected(
        self, place: tuple[int, int], block: Block, mine: np.ndarray, positions: list[int] | None
    ) -> np.ndarray:
        layer, sequence = place
        truth = self.truth[layer][sequence]
        query, key, value = (
            states[layer, sequence].transpose(0, 1).double().numpy()[mine]
            for states in (block.query, block.key, block.value)
        )
        if positions is None or len(mine) == 0:
            return truth.block(query, key, value)
        place_of = np.flatnonzero(self.real[sequence].numpy()).tolist()  # position of each real token
        chosen = {place_of.index(position) for position in positions}
        self._check_set(truth, chosen)
        return truth.decode(query[0], key[0], value[0], chosen)[None]

    def _check_set(self, truth: Sequence, chosen: set[int]) -> None:
        """Same set as the loops; where not exact, scores within 1e-6 of the cut excuse a member."""
        expected = set(truth.globals() + truth.locals())
        if self.exact or chosen == expected:
            assert chosen == expected
            return
        assert len(chosen) == len(expected)
        assert set(truth.locals()) <= chosen
        scores = truth.scores()
        cut = min(scores[token] for token in truth.globals())
        for token in chosen ^ expected:
            assert scores[token] == pytest.approx(cut, rel=1e-6, abs=0)


@st.composite
def _padding(draw: st.DrawFn, batch: int, tokens: int) -> torch.Tensor | None:
    """No mask, left padding, right padding, or holes anywhere (whole rows may be padding)."""
    kind = draw(st.sampled_from(["none", "left", "right", "holes"]))
    if kind == "none":
        return None
    if kind == "holes":
        flags = draw(st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens))
        return torch.tensor(flags).view(batch, tokens).long()
    counts = draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    columns = torch.arange(tokens).expand(batch, -1)
    amount = torch.tensor(counts)[:, None]
    return ((columns >= amount) if kind == "left" else (columns < tokens - amount)).long()


_SPARSITIES = [0.1, 0.25, 0.37, 0.5, 0.8, 0.9, 0.99]
_HEADS = st.builds(
    lambda kv, ratio, dim: Heads(kv * ratio, kv, dim),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([4, 8]),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data(), _HEADS, st.sampled_from(_SPARSITIES), st.integers(1, 2), st.integers(1, 3))
def test_matches_algorithm1_over_turns_padding_and_growth(
    data: st.DataObject, heads: Heads, sparsity: float, layers: int, batch: int
) -> None:
    """Prompt, steps, further turns and growth in any order, any padding: sets and outputs as in the paper."""
    comparison = Comparison(
        heads,
        sparsity,
        layers=layers,
        batch=batch,
        capacity=data.draw(st.integers(1, 24)),
        seed=data.draw(st.integers(0, 99)),
    )
    prompt = data.draw(st.integers(1, 20))
    comparison.forward(prompt, data.draw(_padding(batch, prompt)))
    for action in data.draw(st.lists(st.sampled_from(["decode", "turn", "grow", "hole"]), max_size=7)):
        if action == "grow":
            comparison.driver.store.reserve(comparison.tokens + data.draw(st.integers(1, 40)))
        elif action == "turn":
            turn = data.draw(st.integers(2, 12))
            comparison.forward(turn, data.draw(_padding(batch, turn)))
        elif action == "hole":
            comparison.forward(1, data.draw(_padding(batch, 1)))
        else:
            for _ in range(data.draw(st.integers(1, 6))):
                comparison.forward(1)


def test_200_steps_in_float64_choose_exactly_the_papers_sets() -> None:
    """No drift over a long run with GQA, two layers, left padding and two doublings of the store."""
    comparison = Comparison(
        Heads(4, 2, 8), 0.8, layers=2, batch=2, capacity=60, dtype=torch.float64, seed=1, exact=True
    )
    real = torch.ones((2, 17), dtype=torch.int64)
    real[1, :6] = 0
    comparison.forward(17, real)
    for _ in range(200):
        comparison.forward(1)
    assert comparison.driver.store.capacity == 240


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_a_turn_longer_and_one_shorter_than_the_window_reseed_it(sparsity: float) -> None:
    """After a further turn the window holds the turn's rows, and the history's where the turn has too few."""
    comparison = Comparison(Heads(4, 1, 8), sparsity, batch=2, capacity=200, dtype=torch.float64, seed=2, exact=True)
    comparison.forward(60)
    for turn in (40, 3, 2):
        for _ in range(5):
            comparison.forward(1)
        comparison.forward(turn)
    for _ in range(5):
        comparison.forward(1)


def test_ragged_turn_keeps_the_window_of_a_sequence_with_few_new_tokens() -> None:
    """A turn that is mostly padding for one sequence must not wipe rows of that sequence's history."""
    comparison = Comparison(Heads(2, 2, 8), 0.4, batch=2, capacity=64, dtype=torch.float64, seed=3, exact=True)
    comparison.forward(20, torch.ones((2, 20), dtype=torch.int64))
    real = torch.ones((2, 12), dtype=torch.int64)
    real[1, 2:] = 0
    comparison.forward(12, real)
    for _ in range(6):
        comparison.forward(1)


@pytest.mark.parametrize("capacity", [16, 17, 18, 19, 20, 24])
def test_growth_at_any_fill_leaves_the_choice_alone(capacity: int) -> None:
    """A store that fills up in a run, by decode or by its prompt, selects as if it had been larger."""
    comparison = Comparison(Heads(2, 1, 8), 0.5, batch=1, capacity=capacity, dtype=torch.float64, exact=True)
    comparison.forward(16)
    for _ in range(30):
        comparison.forward(1)


@pytest.mark.parametrize(
    ("tokens", "sparsity", "expected"),
    [(1, 0.99, 1), (10, 0.8, 1), (15, 0.8, 2), (25, 0.8, 3), (25, 0.6, 5), (100, 0.9, 5), (7, 0.5, 2)],
)
def test_half_budget_rounds_halves_up_in_exact_decimals(tokens: int, sparsity: float, expected: int) -> None:
    """The reference itself: k by hand, with halves that binary fractions would round down."""
    assert half_budget(tokens, sparsity) == expected
