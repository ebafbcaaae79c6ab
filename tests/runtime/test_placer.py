"""From a model and its options to the sizes of tiers, as a cache asks for them."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from alisa_compile import AlisaConfig, InfeasibleError
from alisa_compile.hf.planning import budgets_of, forecast, placer
from alisa_compile.runtime.budgets import Budgets
from alisa_compile.runtime.profile import FOLDER_VARIABLE, MachineProfile, Table, profile_path
from alisa_compile.runtime.store import StoreShape, TokenStore
from alisa_compile.runtime.tiers import TierSizes
from tests.kernels.harness import Block, Driver, Heads, close, random_block
from tests.pretend_gpu import Order, pretend_gpu
from tests.support import tiny_model

CPU = torch.device("cpu")
STORES = [StoreShape(2, 1, 2, 16, torch.float32, CPU), StoreShape(1, 1, 4, 8, torch.float32, CPU)]
RATE = Table(((4096.0, 1e9),))
PROFILE = MachineProfile(
    machine="test", device="cpu", dtype="float32", device_to_host=RATE, host_to_device=RATE, disk_write=RATE,
    disk_read=RATE, attention=Table(((1e4, 1e-6), (1e8, 1e-2)), grows=True),
    linear=Table(((1.0, 1e-9), (64.0, 1e-9)), grows=True), layer_seconds=1e-6,
)  # fmt: skip


@pytest.fixture
def llama() -> Any:
    return tiny_model("llama")


def test_no_time_is_lost_where_everything_fits(llama: Any) -> None:
    """auto on this machine: no tiers, in less than a millisecond (the fastest of several: others use the machine)."""
    places = placer(llama.config, STORES, AlisaConfig(), budgets_of(llama.config, STORES, AlisaConfig(), 4096))
    times = []
    for _ in range(50):
        started = time.perf_counter()
        assert places[0](1, 4096) is None
        times.append(time.perf_counter() - started)
    assert min(times) < 1e-3


@pytest.mark.parametrize("batch", (1, 3))
def test_all_stores_share_the_budgets(llama: Any, batch: int) -> None:
    """Stores that ask their places, one after another and for another batch size, keep to them together."""
    config = AlisaConfig(device_kv_budget=300_000, host_kv_budget="100kB", disk_kv_budget="2MB")
    places = placer(llama.config, STORES, config, budgets_of(llama.config, STORES, config, 500))
    assert len(places) == len(STORES)
    stores = [
        TokenStore(StoreShape(s.num_layers, batch, s.kv_heads, s.head_dim, s.dtype, CPU), config, 500, place)
        for s, place in zip(STORES, places, strict=True)
    ]
    total = {tier: sum(store.bytes_by_tier()[tier] for store in stores) for tier in ("device", "host", "disk")}
    assert total["device"] <= 300_000 and total["host"] <= 100_000 and 0 < total["disk"] <= 2_000_000
    assert total["device"] > 250_000 and total["host"] > 90_000
    with pytest.raises(InfeasibleError, match="90000 tokens do not fit the KV budgets"):
        places[1](batch, 90_000)


def test_budgets_are_resolved_once(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the stores themselves take later does not count against them."""
    free = [10_000_000_000]
    monkeypatch.setattr("alisa_compile.runtime.budgets._free_memory", lambda: free[0])
    budgets = budgets_of(llama.config, STORES, AlisaConfig(), 4096)
    assert 8_000_000_000 < budgets.device < 9_000_000_000 and "0 B of weights" in budgets.origin["device"]
    place = placer(llama.config, STORES, AlisaConfig(), budgets)[0]
    free[0] = 1000
    assert place(1, 4096) is None


def test_only_limits_that_were_asked_for_refuse(
    llama: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is free is an estimate: with no budget given, the allocation itself tells whether everything fits."""
    monkeypatch.setattr("alisa_compile.runtime.budgets._free_memory", lambda: 1000)
    estimated, asked = AlisaConfig(), AlisaConfig(device_kv_budget=1000)
    with caplog.at_level("WARNING"):
        budgets = budgets_of(llama.config, STORES, estimated, 4096)
        assert placer(llama.config, STORES, estimated, budgets)[0](1, 4096) is None
    assert "it may not fit" in caplog.text
    with pytest.raises(InfeasibleError):
        placer(llama.config, STORES, asked, budgets_of(llama.config, STORES, asked, 4096))[0](1, 4096)


def test_a_gpu_that_holds_a_part(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no option at all: what is free there is kept to, the other rows are on the host, and steps are right."""
    heads, capacity, batch = Heads(4, 2, 16), 200, 2
    shapes = [StoreShape(2, batch, heads.kv, heads.dim, torch.float32, torch.device("cuda", 0))]
    free = {"_free_on_gpu": 10**9, "_free_memory": 10**9}
    for name in free:
        monkeypatch.setattr(f"alisa_compile.runtime.budgets.{name}", lambda *_, name=name: free[name])

    def sizes() -> TierSizes | None:
        budgets = budgets_of(llama.config, shapes, AlisaConfig(), capacity)
        return placer(llama.config, shapes, AlisaConfig(), budgets)[0](batch, capacity)

    assert sizes() is None  # it holds all
    beside = 9 * 10**8 - budgets_of(llama.config, shapes, AlisaConfig(), capacity).device
    free["_free_on_gpu"] = int((120_000 + beside) / 0.9)
    part = sizes()
    assert part is not None and 0 < part.device < capacity
    generator = torch.Generator().manual_seed(0)
    common: dict[str, Any] = {"capacity": capacity, "layers": 2, "batch": batch, "dtype": torch.float32}
    with pretend_gpu(monkeypatch, Order.RANDOM):
        ours, theirs = Driver(heads, sizes=part, device="cuda", **common), Driver(heads, **common)
        assert ours.store.bytes_by_tier()["device"] <= 120_000 < theirs.store.bytes_by_tier()["device"]
        for tokens in (150, *[1] * 40):
            block = random_block(generator, heads, tokens, layers=2, batch=batch, dtype=torch.float32)
            there = Block(*(tensor.to("cuda") for tensor in (block.query, block.key, block.value)))
            close(ours.forward(there).cpu(), theirs.forward(block), torch.float32)
        assert ours.store.counters()[1] > 0


def test_activations_of_short_prompts_are_small(llama: Any) -> None:
    """A large batch of short prompts does not count as one of long prompts; a width for each layer is understood."""
    wide = [StoreShape(2, 64, 2, 16, torch.float32, CPU)]
    short = budgets_of(llama.config, wide, AlisaConfig(), 16).device
    assert short >= budgets_of(llama.config, wide, AlisaConfig(), 4096).device
    by_layer = SimpleNamespace(hidden_size=64, vocab_size=128, intermediate_size=[96, 192])  # as in Gemma 3n
    by_layer.get_text_config = lambda **_: by_layer
    assert budgets_of(by_layer, wide, AlisaConfig(), 16).device > 0


def test_a_given_host_budget_is_no_longer_the_devices(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU both tiers share one memory."""
    monkeypatch.setattr("alisa_compile.runtime.budgets._free_memory", lambda: 16_000_000_000)
    config = AlisaConfig(host_kv_budget=8_000_000_000)
    budgets = budgets_of(llama.config, STORES, config, 100)
    assert budgets.device + budgets.host < 16_000_000_000


def test_prediction_needs_a_saved_profile(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is measured in a call of generate, and what goes wrong is a warning."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    budgets = Budgets(100_000, 10**9, 0, dict.fromkeys(("device", "host", "disk"), "as given"))
    ask = (llama, None, AlisaConfig(), 1, 300, 20, budgets)
    assert forecast(*ask) is None and caplog.text == ""
    path = profile_path(llama.device, llama.dtype)
    PROFILE.save(path)
    expected = forecast(*ask)
    assert expected is not None and expected.plan is not None
    assert expected.plan.p1 == 0 and len(expected.plan.step_ms) == 20
    small = Budgets(10, 0, 0, budgets.origin)
    too_small = forecast(llama, None, AlisaConfig(), 1, 300, 20, small)
    assert too_small is not None and too_small.plan is None
    assert "no step times are predicted" in caplog.text and "do not fit the KV budgets" in caplog.text
    path.write_text("{}", encoding="utf-8")
    assert forecast(*ask) is None
    assert caplog.text.count("no step times are predicted") == 2
