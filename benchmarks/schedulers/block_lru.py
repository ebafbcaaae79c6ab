"""vLLM's memory management: blocks of 16 tokens, and whole sequences preempted when no block is free.

As vLLM (Kwon et al., SOSP 2023; its V1 scheduler): sequences run in order of arrival, each takes a block when its last
one is full, and where none is free the sequence that came last loses all its blocks. Its K and V are dropped; it waits
in front of those that never ran, and when there are blocks for all of its tokens its K and V are made again by one
prefill over prompt and generated tokens. Attention is dense and everything is on the device. As vLLM does with CUDA
graphs, batches are filled up to one of a few sizes that are compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from alisa_compile import AlisaCache, InfeasibleError, compat
from alisa_compile.backend import alisa
from alisa_compile.config import AlisaConfig
from alisa_compile.runtime.footprint import store_bytes
from alisa_compile.runtime.store import StoreShape, TokenStore
from alisa_compile.runtime.tiers import Pool, Tier, TierSizes

BLOCK = 16  # tokens
PREFILL_TOKENS = 4096  # at once, of several sequences


@dataclasses.dataclass(eq=False)
class Request:
    """A request. number: its place in the batch of the caller. tokens: prompt and generated ones; wanted: in the end.

    cached: so many first tokens have K and V. blocks: where, in order.
    """

    number: int
    tokens: list[int]
    wanted: int
    cached: int = 0
    blocks: list[int] = dataclasses.field(default_factory=list)

    @property
    def is_done(self) -> bool:
        """Whether all its tokens are there."""
        return len(self.tokens) == self.wanted


class Scheduler:
    """Who runs and which blocks it has: arithmetic alone, no tensors.

    blocks: how many there are. preemptions, recomputed: sequences that lost their blocks, and tokens whose K and V had
    to be made again, so far.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.free = list(range(blocks))[::-1]
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.preemptions = self.recomputed = self.most_used = 0

    def submit(self, sequences: Iterable[Request]) -> None:
        """New requests, in order of arrival."""
        self.waiting += sequences

    def before_step(self) -> list[Request]:
        """Give every running sequence a place for its coming token, or preempt; those to prefill now, in order.

        Nobody is let in while others had to go.
        """
        preempted = False
        place = 0
        while place < len(self.running):
            sequence = self.running[place]
            if self._extend(sequence, len(sequence.tokens)):
                place += 1
            else:
                self._preempt(self.running.pop())
                preempted = True
        entered: list[Request] = []
        while not preempted and self.waiting and self._extend(self.waiting[0], len(self.waiting[0].tokens)):
            entered.append(self.waiting.pop(0))
        self.running += entered
        return entered

    def after_step(self) -> list[Request]:
        """Let go of the sequences that are done, and return them."""
        done = [sequence for sequence in self.running if sequence.is_done]
        for sequence in done:
            self._release(sequence)
        self.running = [sequence for sequence in self.running if not sequence.is_done]
        return done

    def _extend(self, sequence: Request, tokens: int) -> bool:
        """Blocks for so many tokens; False, and nothing is taken, where too few are free."""
        missing = -(-tokens // BLOCK) - len(sequence.blocks)
        if missing > len(self.free):
            return False
        sequence.blocks += [self.free.pop() for _ in range(missing)]
        self.most_used = max(self.most_used, self.blocks - len(self.free))
        return True

    def _preempt(self, sequence: Request) -> None:
        self._release(sequence)
        self.waiting.insert(0, sequence)
        self.preemptions += 1
        self.recomputed += sequence.cached
        sequence.cached = 0

    def _release(self, sequence: Request) -> None:
        self.free += sequence.blocks[::-1]
        sequence.blocks = []


class BlockLRU:
    """A model compiled by alisa, dense, over a pool of blocks of a fixed number of bytes.

    budget: bytes of everything that is kept, tables included. After `generate`, `scheduler` tells what happened.
    """

    def __init__(self, model: Any, budget: int, inner_compiler: str = "inductor") -> None:
        self.model, self.budget = model, budget
        self.options = AlisaConfig(sparsity=0.0, inner_compiler=inner_compiler)
        options = {"sparsity": 0.0, "inner_compiler": inner_compiler}
        self._compiled = torch.compile(_entry(), backend=alisa, options=options)
        self._pool: _Pages | None = None
        self.scheduler: Scheduler

    def release(self) -> None:
        """Free the storage that is kept for the next call."""
        self._pool = None

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks and of all tables."""
        return 0 if self._pool is None else self._pool.nbytes

    @torch.no_grad()
    def generate(self, ids: torch.Tensor, *, max_new_tokens: int, **_: Any) -> torch.Tensor:
        """Greedy; prompts `[B, S]` without padding, `[B, S + new]` back. `InfeasibleError` where one does not fit."""
        longest = ids.shape[1] + max_new_tokens
        pages = self._pages(ids.shape[0], longest)
        scheduler = self.scheduler = Scheduler(pages.blocks)
        scheduler.submit(Request(number, row, longest) for number, row in enumerate(ids.tolist()))
        done: list[Request] = []
        while scheduler.running or scheduler.waiting:
            entered = scheduler.before_step()
            for group in _alike(entered):
                self._prefill(pages, group)
            decoding = scheduler.running[: len(scheduler.running) - len(entered)]
            if decoding:
                self._decode(pages, decoding)
            done += scheduler.after_step()
        done.sort(key=lambda sequence: sequence.number)
        return torch.tensor([sequence.tokens for sequence in done])

    def _pages(self, batch: int, longest: int) -> _Pages:
        if self._pool is None or (self._pool.batch, self._pool.longest) != (batch, longest):
            self._pool = None  # freed before the new one is made
            self._pool = _Pages(self.model, self.options, self.budget, batch, longest)
        return self._pool

    def _prefill(self, pages: _Pages, group: Sequence[Request]) -> None:
        """Make K and V of all tokens of sequences that have equally many, and one token more."""
        store = pages.prefill_store(group)
        cache = AlisaCache(self.model.config, sparsity=0.0)
        cache.adopt([store])
        ids = torch.tensor([sequence.tokens for sequence in group])
        logits = self.model(ids, past_key_values=cache, logits_to_keep=1).logits
        _append(group, logits)

    def _decode(self, pages: _Pages, running: Sequence[Request]) -> None:
        """One token for each."""
        cache, mask = pages.decode_batch(running)
        tokens = torch.zeros((len(mask), 1), dtype=torch.int64)
        positions = torch.zeros_like(tokens)
        tokens[: len(running), 0] = torch.tensor([sequence.tokens[-1] for sequence in running])
        positions[: len(running), 0] = torch.tensor([sequence.cached for sequence in running])
        for tensor in (tokens, positions, mask):
            compat.mark_static(tensor, 0)
        compat.mark_dynamic(mask, 1)
        with compat.generous_recompile_limit():
            out = self._compiled(
                self.model, input_ids=tokens, position_ids=positions, attention_mask=mask, past_key_values=cache
            )
        _append(running, out.logits[: len(running)])


class _Pages:
    """The pool of blocks, and one store over it for every size of batch that is compiled."""

    def __init__(self, model: Any, options: AlisaConfig, budget: int, batch: int, longest: int) -> None:
        self.model, self.options, self.batch, self.longest = model, options, batch, longest
        self.sizes = sorted({max(1, -(-batch * quarter // 4)) for quarter in (1, 2, 3, 4)})
        cache = AlisaCache(model.config, sparsity=0.0)
        (self._form,) = set(cache.layer_shapes)
        self._layers = len(cache.layer_shapes)
        # A batch of equally long sequences that enter has a table as well, never together with a larger one.
        tables = sum(self._table_bytes(size) for size in (*self.sizes, batch))
        row = 2 * self._form[0] * self._form[1] * model.dtype.itemsize
        block_bytes = BLOCK * row * self._layers
        self.blocks = (budget - tables) // block_bytes - 1  # one for the tokens of sequences that are not there
        needed = -(-longest // BLOCK)
        if self.blocks < needed:
            least = (needed + 1) * block_bytes + tables
            raise InfeasibleError(
                "a sequence does not fit the blocks",
                got=f"{max(0, self.blocks)} blocks in {budget} bytes",
                expected=f"{needed} blocks for {longest} tokens",
                fix=f"raise the budget to {least} bytes",
                smallest_budgets={"device": least},
                longest_context=max(0, self.blocks) * BLOCK,
            )
        shape = (self._layers * (self.blocks + 1) * BLOCK, 2, *self._form)
        self.rows = torch.zeros(shape, dtype=model.dtype)
        self.caches: dict[int, AlisaCache] = {}
        for size in self.sizes:
            self.caches[size] = AlisaCache(model.config, sparsity=0.0)
            self.caches[size].adopt([self._store(size, longest + 1)])
        self._members: list[tuple[int, int]] = []  # of the latest decode: sequence and blocks that its table has
        self._size = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks and of all tables, one for sequences that enter included."""
        tables = sum(self._table_bytes(size) for size in (*self.sizes, self.batch))
        return self.rows.nbytes + tables

    def _shape(self, batch: int) -> StoreShape:
        return StoreShape(self._layers, batch, *self._form, self.model.dtype, torch.device("cpu"))

    def _table_bytes(self, batch: int) -> int:
        """Of everything but rows."""
        kinds = store_bytes(self._shape(batch), self.options, self.longest + 1, TierSizes(0, 0, 0, 0))
        return kinds["table"] + kinds["length"] + kinds["valid"]

    def _store(self, batch: int, capacity: int) -> _PagedStore:
        return _PagedStore(self._shape(batch), self.options, capacity, self.rows)

    def _slots(self, blocks: Sequence[int]) -> torch.Tensor:
        """`[L, blocks * 16]` int32."""
        first = torch.tensor(blocks, dtype=torch.int32)[:, None] * BLOCK + torch.arange(BLOCK, dtype=torch.int32)
        layers = torch.arange(self._layers, dtype=torch.int32)[:, None] * ((self.blocks + 1) * BLOCK)
        return layers + first.flatten()

    def prefill_store(self, group: Sequence[Request]) -> _PagedStore:
        """An empty store whose rows go to the blocks of sequences of equal length."""
        tokens = len(group[0].tokens)
        store = self._store(len(group), tokens + 1)
        for place, sequence in enumerate(group):
            store.table[:, place, 0, :tokens] = self._slots(sequence.blocks)[:, :tokens]
        store.table[..., tokens] = self._slots([self.blocks])[:, None, None, 0]
        self._members = []
        return store

    def decode_batch(self, running: Sequence[Request]) -> tuple[AlisaCache, torch.Tensor]:
        """The cache of the smallest size that holds these sequences, and the mask `[size, tokens + 1]`.

        The last tokens of all sequences stand in one column, so that shorter ones are padded on the left. Padding, and
        sequences that are not there, have the slots of one spare block.
        """
        size = next(size for size in self.sizes if size >= len(running))
        cache = self.caches[size]
        store = cache.stores[0]
        longest = max(sequence.cached for sequence in running)
        numbers = [sequence.number for sequence in running]
        if size != self._size or numbers != [number for number, _ in self._members]:
            spare = self._slots([self.blocks])[:, 0]
            store.table.copy_(spare[:, None, None, None].expand_as(store.table))
            store.length.fill_(longest)
            store.host_length, store.has_history = longest, True
            self._size, self._members = size, [(number, 0) for number in numbers]
        for place, sequence in enumerate(running):
            known = self._members[place][1]
            if known < len(sequence.blocks):
                first = longest - sequence.cached + known * BLOCK
                slots = self._slots(sequence.blocks[known:])[:, : store.capacity - first]
                store.table[:, place, 0, first : first + slots.shape[1]] = slots
                self._members[place] = (sequence.number, len(sequence.blocks))
        cached = torch.zeros((size, 1), dtype=torch.int64)
        cached[: len(running), 0] = torch.tensor([sequence.cached + 1 for sequence in running])
        mask = (torch.arange(longest + 1) > longest - cached).to(torch.int64)
        return cache, mask


class _PagedStore(TokenStore):
    """A store of sequences whose rows lie in blocks of a pool that it does not own; its table is filled by others."""

    def __init__(self, shape: StoreShape, config: AlisaConfig, capacity: int, rows: torch.Tensor) -> None:
        self._shared = rows
        super().__init__(shape, config, capacity)

    def _make_pool(self, tier: Tier, slots: int, device: torch.device, capacity: int) -> Pool:
        # A tensor of its own on the same storage: a compiled step finds its store through the pool.
        rows = torch.empty(0, dtype=self._shared.dtype).set_(self._shared)
        return Pool(tier, self.row, rows, None)


def _alike(sequences: Iterable[Request]) -> list[list[Request]]:
    """Groups of equal length, in order, none with more tokens than are prefilled at once."""
    groups: list[list[Request]] = []
    for sequence in sequences:
        length = len(sequence.tokens)
        last = groups[-1] if groups else []
        if last and len(last[0].tokens) == length and (len(last) + 1) * length <= PREFILL_TOKENS:
            last.append(sequence)
        else:
            groups.append([sequence])
    return groups


def _append(sequences: Sequence[Request], logits: torch.Tensor) -> None:
    """The likeliest token of each, after its K and V have been stored."""
    for sequence, token in zip(sequences, logits[:, -1].argmax(-1).tolist(), strict=True):
        sequence.cached = len(sequence.tokens)
        sequence.tokens.append(token)


def _entry() -> Any:
    """A function of its own: torch counts recompilations by code object."""
    source: dict[str, Any] = {}
    exec("def forward(model, **inputs):\n    return model(**inputs)\n", source)
    return source["forward"]
