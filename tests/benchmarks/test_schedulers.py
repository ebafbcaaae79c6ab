"""The paper's comparators: the tokens of stock transformers, the budget in counted bytes, and who has which block."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hypothesis import given, settings
from hypothesis import strategies as st

from alisa_compile import InfeasibleError
from benchmarks.memory import allocated
from benchmarks.schedulers.block_lru import BLOCK, BlockLRU, Request, Scheduler
from benchmarks.schedulers.static_split import StaticSplit, StaticSplitStore
from tests.support import assert_same_tokens, compiled, tiny_model

PROMPT, NEW = 40, 45
EAGER = {"inner_compiler": "eager"}


def prompts(batch: int, length: int = PROMPT) -> torch.Tensor:
    return torch.randint(2, 128, (batch, length), generator=torch.Generator().manual_seed(1))


def kv_bytes(model: Any, batch: int, tokens: int) -> int:
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = config.hidden_size // config.num_attention_heads
    return int(2 * heads * width * 4 * config.num_hidden_layers * batch * tokens)


def half(model: Any, batch: int) -> dict[str, int]:
    """Device and host for `PROMPT + NEW` tokens; staging and tables take 128 positions of a layer and more."""
    kv = kv_bytes(model, batch, PROMPT + NEW)
    return {"device_kv_budget": kv, "host_kv_budget": kv}


@pytest.fixture(scope="module")
def opt() -> Any:
    return tiny_model("opt")


def test_static_split_gives_the_tokens_of_the_stock_model(opt: Any) -> None:
    """Dense, a part of every layer on the host; the second call uses the first one's storage."""
    ids = prompts(3)
    ours = StaticSplit(opt, **half(opt, 3), **EAGER)
    assert_same_tokens(opt, ours, ids, torch.ones_like(ids), NEW)
    store = ours.store
    assert 0.3 < store.host_share < 1
    assert_same_tokens(opt, ours, ids.flip(1), torch.ones_like(ids), NEW)
    assert ours.store is store


def test_static_split_takes_a_prompt_in_pieces(opt: Any) -> None:
    """As `generate` cuts it where many sequences have little room."""
    ids = prompts(3)
    ours = StaticSplit(opt, **half(opt, 3), **EAGER)
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6, "pad_token_id": 0}
    expected = opt.generate(ids, **options)
    assert torch.equal(ours.generate(ids, prefill_chunk_size=16, **options), expected)


def test_static_split_of_a_sparse_policy_gives_the_tokens_of_the_policy(opt: Any) -> None:
    """Those of alisa with everything on the device; rows of the working set come from the host in each step."""
    ids = prompts(3)
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    expected = compiled(opt, "eager", sparsity=0.6).generate(ids, **options)
    ours = StaticSplit(opt, sparsity=0.6, **half(opt, 3), **EAGER)
    assert torch.equal(ours.generate(ids, **options), expected)
    before, after = ours.store.statistics.counters_after_prefill, ours.store.counters()
    assert before is not None
    up, missed = (after[place] - before[place] for place in (1, 6))
    assert missed > NEW and up == missed * 2 * 64 * 4 + streamed(ours.store)


def streamed(store: StaticSplitStore) -> int:
    """Bytes that refresh steps, dense ones, have read from the host: counted by replaying the lengths."""
    assert store.selection is not None
    total = 0
    for length, since, _ in store.statistics.decode_steps:
        for layer in range(store.shape.num_layers):
            if store.selection.is_refresh_step(since, layer) or since == 0:
                total += below_before(store, length) * store.shape.batch_size * store.row.bytes_per_row
    return total


def below_before(store: StaticSplitStore, length: int) -> int:
    """Positions on the host when the step that makes `length` of them begins."""
    return min(length - 1, math.ceil(store.host_share * length))


def test_static_split_keeps_its_share_and_its_budget(opt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every step so many positions are on the device and no more, from the prompt on; each step reads the rest.

    Bytes as torch's allocator counts them.
    """
    seen: list[tuple[int, int, int, int]] = []
    plain = StaticSplitStore.end_step

    def end_step(store: StaticSplitStore, new_tokens: int) -> None:
        plain(store, new_tokens)
        assert store.tiers is not None
        resident = (store.table[..., : store.host_length] >= 0).sum(-1)
        assert int(resident.min()) == int(resident.max())
        taken = store.tiers.owner.view(-1, store.tiers.quota)
        seen.append((store.host_length, int(resident.max()), store.counters()[1], int((taken < 0).sum(1).max())))

    monkeypatch.setattr(StaticSplitStore, "end_step", end_step)
    ids = prompts(3)
    budgets = half(opt, 3)
    ours = StaticSplit(opt, **budgets, **EAGER)
    _, memory = allocated(lambda: setattr(ours, "cache", ours._new_cache(3, PROMPT + NEW + 2)))
    assert memory.held <= sum(budgets.values())
    ours.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
    store = ours.store
    by_tier = store.bytes_by_tier()
    assert by_tier["device"] <= budgets["device_kv_budget"] and by_tier["host"] <= budgets["host_kv_budget"]
    assert memory.held >= sum(by_tier.values())
    row = store.row.bytes_per_row * 3 * store.shape.num_layers
    assert [length for length, *_ in seen] == list(range(PROMPT, PROMPT + NEW))
    for (before, kept, up, _), (length, resident, up_after, free) in itertools.pairwise(seen):
        assert kept == before - below_before(store, before + 1)
        assert resident == length - below_before(store, length + 1)
        assert up_after - up == (before - kept) * row  # dense: all that is not on the device
        assert free <= 1


def test_static_split_with_room_for_everything_reads_nothing(opt: Any) -> None:
    """Then it has no share on the host."""
    ids = prompts(2)
    ours = StaticSplit(opt, **EAGER)
    assert_same_tokens(opt, ours, ids, torch.ones_like(ids), 5)
    assert ours.store.host_share == 0 and ours.store.tiers is None


def test_blocks_give_the_tokens_of_the_stock_model() -> None:
    """Sequences are preempted, computed again, and decoded beside longer ones, each with RoPE of its own positions."""
    model, ids = tiny_model("llama"), prompts(5)
    budget = int(0.7 * kv_bytes(model, 5, PROMPT + NEW))
    ours = BlockLRU(model, budget, "eager")
    assert_same_tokens(model, ours, ids, torch.ones_like(ids), NEW)
    assert ours.scheduler.preemptions >= 2 and ours.scheduler.recomputed > 2 * PROMPT
    assert_same_tokens(model, ours, ids.flip(1), torch.ones_like(ids), NEW)  # the same pool


def test_blocks_keep_their_budget(opt: Any) -> None:
    """Blocks and tables, as torch's allocator counts them."""
    ids, budget = prompts(5), int(0.7 * kv_bytes(opt, 5, PROMPT + NEW))
    ours = BlockLRU(opt, budget, "eager")
    _, memory = allocated(lambda: ours._pages(5, PROMPT + NEW))
    assert memory.held <= budget and ours.nbytes <= budget
    assert ours.nbytes > 0.85 * budget  # what is left is less than a block and a table
    ours.generate(ids, max_new_tokens=NEW)
    assert ours.scheduler.most_used <= ours.scheduler.blocks
    with pytest.raises(InfeasibleError, match="does not fit the blocks") as caught:
        BlockLRU(opt, kv_bytes(opt, 1, 64), "eager").generate(ids, max_new_tokens=NEW)
    BlockLRU(opt, caught.value.smallest_budgets["device"], "eager").generate(ids, max_new_tokens=NEW)


def test_preemption_by_hand() -> None:
    """Two prompts of one block, three blocks, 17 new tokens.

    The first decode step needs a second block for each, and there is one: the second sequence loses its 16 tokens, and
    waits until the first is done, because its 17 tokens need two blocks.
    """
    scheduler = Scheduler(3)
    scheduler.submit(Request(number, [5] * BLOCK, BLOCK + 17) for number in range(2))
    history = []
    while scheduler.running or scheduler.waiting:
        advance(scheduler)
        history.append([request.number for request in scheduler.running])
        scheduler.after_step()
    assert (scheduler.preemptions, scheduler.recomputed, scheduler.most_used) == (1, 16, 3)
    assert history == [[0, 1], *[[0]] * 16, *[[1]] * 16]


def advance(scheduler: Scheduler) -> None:
    """A step without a model."""
    scheduler.before_step()
    for request in scheduler.running:
        request.cached = len(request.tokens)
        request.tokens.append(7)


def naive(batch: int, prompt: int, new: int, blocks: int) -> tuple[int, int, list[int]]:
    """Preemptions, tokens recomputed and the order of finishing, from lengths alone."""
    lengths = [prompt] * batch
    running: list[int] = []
    waiting = list(range(batch))
    preemptions = recomputed = 0
    finished: list[int] = []
    while running or waiting:
        lost, place = False, 0
        while place < len(running):
            extended = sum(math.ceil(lengths[i] / 16) for i in running[: place + 1])
            others = sum(math.ceil((lengths[i] - 1) / 16) for i in running[place + 1 :])
            if extended + others <= blocks:
                place += 1
                continue
            victim = running.pop()
            waiting.insert(0, victim)
            preemptions, recomputed, lost = preemptions + 1, recomputed + lengths[victim] - 1, True
        while not lost and waiting and sum(math.ceil(lengths[i] / 16) for i in [*running, waiting[0]]) <= blocks:
            running.append(waiting.pop(0))
        for i in running:
            lengths[i] += 1
        finished += [i for i in running if lengths[i] == prompt + new]
        running = [i for i in running if lengths[i] < prompt + new]
    return preemptions, recomputed, finished


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 50), st.integers(1, 70), st.integers(0, 30))
def test_blocks_are_those_of_a_naive_simulation(batch: int, prompt: int, new: int, spare: int) -> None:
    """No block has two owners, none is lost, nobody has more than its tokens need."""
    blocks = math.ceil((prompt + new) / 16) + spare
    scheduler = Scheduler(blocks)
    scheduler.submit(Request(number, [5] * prompt, prompt + new) for number in range(batch))
    finished = []
    while scheduler.running or scheduler.waiting:
        advance(scheduler)
        owned = [block for request in scheduler.running for block in request.blocks]
        assert sorted([*owned, *scheduler.free]) == list(range(blocks))
        for request in scheduler.running:
            assert len(request.blocks) == math.ceil(request.cached / BLOCK)
        assert not any(request.blocks for request in scheduler.waiting)
        finished += [request.number for request in scheduler.after_step()]
    assert (scheduler.preemptions, scheduler.recomputed, finished) == naive(batch, prompt, new, blocks)
