"""The token store: growth, reset, the full cache, accounting."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alisa_compile.errors import CacheError
from tests.kernels.harness import Driver, Heads, random_block, stored_rows

_HEADS = Heads(4, 2, 16)
_STORES: dict[str, dict[str, Any]] = {
    "decayed": {"sparsity": 0.4, "sinks": 1, "window": 5, "refresh": 9},
    "per_kv_head": {"sparsity": 0.4, "sinks": 1, "window": 5, "refresh": 0, "head_mode": "per_kv_head"},
    "paper": {"paper": True, "sparsity": 0.4},
    "int8": {"kv_dtype": "int8", "sparsity": 0.4, "sinks": 1, "refresh": 0},
    "dense": {"sparsity": 0},
}
_SPARSE = [name for name in _STORES if name != "dense"]


def _driver(name: str, capacity: int) -> Driver:
    return Driver(_HEADS, capacity=capacity, layers=2, batch=2, **_STORES[name])


class Run:
    """The same random forward passes on any number of stores, padded on the left in the second sequence."""

    def __init__(self, *drivers: Driver, padded: bool = True) -> None:
        self.drivers = drivers
        self.generator = torch.Generator().manual_seed(0)
        self.padded = padded
        self.tokens = 0

    def forward(self, tokens: int) -> list[torch.Tensor]:
        """Outputs of each store."""
        block = random_block(self.generator, _HEADS, tokens, layers=2, batch=2, dtype=torch.float32)
        self.tokens += tokens
        mask = torch.ones((2, self.tokens), dtype=torch.int64)
        mask[1, :3] = 0
        return [driver.forward(block, mask if self.padded else None) for driver in self.drivers]


@pytest.mark.parametrize("grow_at", [0, 1, 7])
@pytest.mark.parametrize("name", list(_STORES))
def test_growth_changes_no_bit_of_what_follows(name: str, grow_at: int) -> None:
    """Rows, scales, validity, scores (ring, decayed) and sets survive: outputs equal a large store's."""
    small, large = _driver(name, 30), _driver(name, 200)
    run = Run(small, large)
    run.forward(11)
    for step in range(18):
        if step == grow_at:
            small.store.reserve(31)
            assert small.store.capacity == 60
        results = run.forward(1)
        assert torch.equal(results[0], results[1])
        _same_sets(small, large)
    results = run.forward(6)
    assert torch.equal(results[0], results[1])
    _same_sets(small, large)


def _same_sets(first: Driver, second: Driver) -> None:
    if first.store.counts is None:
        return
    for layer in range(2):
        for sequence in range(2):
            for group in range(first.store.groups):
                place = (layer, sequence, group)
                assert first.working_set(*place) == second.working_set(*place)


@pytest.mark.parametrize("start", [1, 5, 8])
@pytest.mark.parametrize("name", list(_STORES))
def test_doubling_as_it_fills_changes_no_bit(name: str, start: int) -> None:
    """A store that fills to the last place grows by itself, and chooses what a large store chooses."""
    small, large = _driver(name, start), _driver(name, 200)
    run = Run(small, large)
    small.store.reserve(5)
    run.forward(5)
    for _ in range(40):
        results = run.forward(1)
        assert torch.equal(results[0], results[1])
        _same_sets(small, large)
    assert 45 < small.store.capacity < 100


@pytest.mark.parametrize("name", list(_STORES))
def test_growth_keeps_rows_and_marks_new_places_valid(name: str) -> None:
    """Rows read back exactly; the rest of the store is as after allocation."""
    driver = _driver(name, 12)
    Run(driver).forward(9)
    before = [stored_rows(driver, layer, sequence) for layer in range(2) for sequence in range(2)]
    driver.store.reserve(13)
    assert driver.store.capacity == 24
    after = [stored_rows(driver, layer, sequence) for layer in range(2) for sequence in range(2)]
    for (old_key, old_value), (key, value) in zip(before, after, strict=True):
        assert torch.equal(old_key, key) and torch.equal(old_value, value)
    valid = torch.ones((2, 24), dtype=torch.bool)
    valid[1, :3] = False
    assert torch.equal(driver.store.valid, valid)
    assert driver.store.length.tolist() == [9, 9]
    assert driver.store.table.unique().numel() == driver.store.table.numel() == driver.store.device_pool.num_slots


def test_reserve_within_the_capacity_moves_nothing() -> None:
    """No new storage, so that addresses which a compiled graph knows stay right."""
    driver = _driver("decayed", 20)
    Run(driver).forward(9)
    before = [tensor.data_ptr() for tensor in driver.store.tensors()]
    driver.store.reserve(20)
    assert [tensor.data_ptr() for tensor in driver.store.tensors()] == before


@pytest.mark.parametrize("name", list(_STORES))
def test_reset_store_behaves_like_a_new_one(name: str) -> None:
    """Nothing of the old conversation shows, though its rows are still in the pool; storage stays."""
    used, fresh = _driver(name, 40), _driver(name, 40)
    before = Run(used)
    before.forward(15)
    for _ in range(12):
        before.forward(1)
    addresses = [tensor.data_ptr() for tensor in used.store.tensors()]
    used.store.reset()
    assert used.store.host_length == 0 and used.store.length.tolist() == [0, 0]
    assert bool(used.store.valid.all()) and not used.store.has_history
    run = Run(used, fresh, padded=False)
    for tokens in (7, *[1] * 10, 4, *[1] * 5):
        results = run.forward(tokens)
        assert torch.equal(results[0], results[1])
    _same_sets(used, fresh)
    assert [tensor.data_ptr() for tensor in used.store.tensors()] == addresses


@pytest.mark.parametrize("name", list(_STORES))
def test_nbytes_counts_every_tensor_of_the_store(name: str) -> None:
    """Found by looking at the object, not by its own list; row bytes agree with the row's shape."""
    store = _driver(name, 24).store
    held = {id(value): value.nbytes for value in vars(store).values() if isinstance(value, torch.Tensor)}
    assert store.nbytes == sum(held.values())
    rows = store.device_pool.num_slots * store.row.bytes_per_row
    assert rows == store.pool.nbytes + (store.scales.nbytes if store.scales is not None else 0)
    assert store.statistics.peak_bytes["device"] == store.nbytes
    store.reserve(25)
    assert store.statistics.peak_bytes["device"] >= store.nbytes


@pytest.mark.parametrize("name", list(_STORES))
def test_full_cache_is_a_typed_error_and_changes_nothing(name: str) -> None:
    """The message names the numbers and the way out; after it the store goes on as one that never saw it."""
    refused, calm = _driver(name, 12), _driver(name, 12)
    run = Run(refused, calm)
    run.forward(9)
    block = random_block(torch.Generator().manual_seed(1), _HEADS, 4, layers=2, batch=2, dtype=torch.float32)
    with pytest.raises(CacheError, match=r"9 tokens stored and 4 new.*at most 12.*reserve\(13\)"):
        refused.forward(block)
    assert refused.store.host_length == 9 and refused.store.length.tolist() == [9, 9]
    for _ in range(2):
        results = run.forward(1)
        assert torch.equal(results[0], results[1])
    refused.store.reserve(15)
    calm.store.reserve(15)
    results = run.forward(4)
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("name", _SPARSE)
def test_effective_sparsity_is_the_share_left_out_of_the_coming_step(name: str) -> None:
    """From the sets themselves, refresh steps counting as complete."""
    driver = _driver(name, 80)
    run = Run(driver, padded=False)
    assert driver.store.effective_sparsity() == 0.0
    run.forward(40)
    for _ in range(9):
        run.forward(1)
        context = run.tokens + 1
        kept = []
        for layer in range(2):
            for sequence in range(2):
                for group in range(driver.store.groups):
                    chosen = driver.working_set(layer, sequence, group)
                    kept.append(context if chosen is None else len(chosen))
        expected = 1 - sum(kept) / len(kept) / context
        assert driver.store.effective_sparsity() == pytest.approx(expected, abs=1e-12)
    if name == "paper":
        assert driver.store.effective_sparsity() == pytest.approx(1 - 2 * 15 / 50)  # k = nearest(50 * 0.6 / 2)


@pytest.mark.parametrize("name", list(_STORES))
def test_copy_is_independent_and_equal(name: str) -> None:
    """A copy goes on as the original does, and steps of one leave the other alone."""
    original, twin = _driver(name, 40), _driver(name, 40)
    run = Run(original)
    run.forward(12)
    run.forward(1)
    twin.store = original.store.copy()
    before = [tensor.clone() for tensor in twin.store.tensors()]
    block = random_block(torch.Generator().manual_seed(2), _HEADS, 1, layers=2, batch=2, dtype=torch.float32)
    mask = torch.ones((2, 14), dtype=torch.int64)
    mask[1, :3] = 0
    first = original.forward(block, mask)
    for kept, tensor in zip(before, twin.store.tensors(), strict=True):
        assert torch.equal(kept, tensor)
    assert torch.equal(first, twin.forward(block, mask))


def test_effective_sparsity_of_a_dense_store_is_zero() -> None:
    """Sparsity 0 selects nothing and holds no scores."""
    driver = _driver("dense", 20)
    Run(driver).forward(5)
    assert driver.store.effective_sparsity() == 0.0
    assert driver.store.scores is None and driver.store.rows is None and driver.store.counts is None


def test_dynamic_dimensions_cover_every_size_that_growth_changes() -> None:
    """A compiler told of these only must not meet another changed size after growth."""
    for name in _STORES:
        store = _driver(name, 20).store
        names = [key for key, value in vars(store).items() if isinstance(value, torch.Tensor)]
        before = {key: getattr(store, key).shape for key in names}
        marked = {(id(tensor), dim) for tensor, dim in store.dynamic_dimensions()}
        ids = {key: id(getattr(store, key)) for key in names}
        store.reserve(400)
        for key in names:
            for dim, size in enumerate(before[key]):
                assert getattr(store, key).shape[dim] == size or (ids[key], dim) in marked, (name, key, dim)


def test_failed_growth_leaves_the_store_as_it_was() -> None:
    """Not enough memory is a CacheError, and nothing stored is lost."""
    driver = _driver("dense", 20)
    run = Run(driver)
    run.forward(5)
    before = [tensor.clone() for tensor in driver.store.tensors()]
    with pytest.raises(CacheError, match=r"not enough memory.*MiB of rows.*kv_dtype"):
        driver.store.reserve(2**40)
    assert driver.store.capacity == 20
    for kept, tensor in zip(before, driver.store.tensors(), strict=True):
        assert torch.equal(kept, tensor)
    run.forward(1)


def test_aborted_step_is_forgotten() -> None:
    """A forward pass that fails after some layers appended leaves no trace in the next one's result."""
    failing, clean = _driver("decayed", 40), _driver("decayed", 40)
    runs = Run(failing), Run(clean)
    for run in runs:
        run.forward(12)
    store = failing.store
    row = torch.full((2, _HEADS.kv, 1, _HEADS.dim), 7.0)
    torch.ops.alisa.kv_append(
        store.pool, store.scales, store.table, store.length, store.valid, row, row, None, None, None, 0
    )
    store.abort_step()
    clean.store.counts.fill_(-1)  # the step after a failure attends to everything
    first, second = (run.forward(1)[0] for run in runs)
    assert torch.equal(first, second)
    assert store.length.tolist() == [13, 13]
