"""Options: every mistake is a typed error with what, got, expected and, where it helps, what to do."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import alisa_compile
from alisa_compile import AlisaConfig, AlisaError, ConfigError, NotAvailableError
from alisa_compile.config import BUDGETS
from alisa_compile.errors import CacheError, GraphError, InfeasibleError, ProfileError


def test_defaults() -> None:
    """The names and defaults that other people's scripts rely on (design section 1)."""
    assert dataclasses.asdict(AlisaConfig()) == {
        "sparsity": 0.8,
        "policy": "swa",
        "paper": False,
        "window": 8,
        "head_mode": "shared",
        "sinks": 4,
        "refresh": 32,
        "local_fraction": 0.5,
        "max_rows": "auto",
        "max_length": None,
        "kv_dtype": "auto",
        "device_kv_budget": "auto",
        "host_kv_budget": "auto",
        "disk_kv_budget": 0,
        "disk_path": None,
        "recompute": "auto",
        "validate": 0,
        "inner_compiler": "inductor",
    }
    assert AlisaConfig.from_options(None) == AlisaConfig.from_options({}) == AlisaConfig()


def test_frozen_and_hashable() -> None:
    """One config may be shared: it cannot change, and equal ones are one dictionary key."""
    config = AlisaConfig(sparsity=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sparsity = 0.1  # type: ignore[misc]
    assert {config: 1}[AlisaConfig.from_options({"sparsity": 0.5})] == 1


@pytest.mark.parametrize(
    ("name", "nearest"),
    (("sparsty", "sparsity"), ("kv_type", "kv_dtype"), ("headmode", "head_mode"), ("disk_budget", "disk_kv_budget")),
)
def test_unknown_option_offers_the_nearest(name: str, nearest: str) -> None:
    """A misspelt name is answered with the right one and the list of all."""
    with pytest.raises(ConfigError) as caught:
        AlisaConfig.from_options({"sparsity": 0.5, name: 1})
    message = str(caught.value)
    assert f"unknown option {name!r}" in message
    assert "expected: one of sparsity, policy, paper" in message
    assert "to fix: did you mean" in message and repr(nearest) in message


def test_unknown_option_like_nothing() -> None:
    """A name that resembles none points at the documentation."""
    with pytest.raises(ConfigError, match=r"unknown option 'qqqq'.*to fix: see AlisaConfig's docstring"):
        AlisaConfig.from_options({"qqqq": 1})


@pytest.mark.parametrize("value", (1, 1.0, -0.01, 2, float("nan"), float("inf"), True, "0.5", None))
def test_sparsity_out_of_range(value: Any) -> None:
    """Sparsity is a number in [0, 1)."""
    with pytest.raises(ConfigError) as caught:
        AlisaConfig(sparsity=value)
    assert f"option 'sparsity' is out of range; got: {value!r}; expected: a number in [0, 1)" in str(caught.value)


@pytest.mark.parametrize("value", (0, 0.0, 0.5, 0.999))
def test_sparsity_in_range(value: Any) -> None:
    assert AlisaConfig(sparsity=value).is_sparse == (value > 0)


WRONG: tuple[tuple[str, Any, str], ...] = (
    ("local_fraction", 0, r"got: 0; expected: a number in \(0, 1\)"),
    ("local_fraction", 1.0, r"expected: a number in \(0, 1\)"),
    ("window", 1, "got: 1; expected: an integer >= 2"),
    ("window", 8.0, r"got: 8\.0; expected: an integer >= 2"),
    ("window", True, "got: True; expected: an integer"),
    ("sinks", -1, "got: -1; expected: an integer >= 0"),
    ("refresh", "often", "got: 'often'; expected: an integer >= 0"),
    ("max_length", 0, "expected: an integer >= 1"),
    ("max_rows", 1, "expected: an integer >= 2"),
    ("max_rows", "all", "got: 'all'; expected: an integer"),
    ("paper", 1, "got: 1; expected: True or False"),
    ("policy", "swaa", "got: 'swaa'; expected: one of swa, dense, .*; to fix: did you mean 'swa'"),
    ("head_mode", "per_head", "expected: one of shared, per_kv_head; to fix: did you mean 'per_kv_head'"),
    ("kv_dtype", "int4", "expected: one of auto, int8; to fix: did you mean 'int8'"),
    ("kv_dtype", None, "got: None; expected: one of auto, int8"),
    ("recompute", "sometimes", "expected: one of auto, off, always"),
    ("inner_compiler", "induct", "to fix: did you mean 'inductor'"),
    ("validate", -1, "expected: an integer >= 0"),
)


@pytest.mark.parametrize(("name", "value", "text"), WRONG)
def test_wrong_value(name: str, value: Any, text: str) -> None:
    """The option is named, with the value given and those allowed."""
    with pytest.raises(ConfigError, match=f"option '{name}' .*{text}") as caught:
        AlisaConfig.from_options({name: value})
    assert caught.value.got == repr(value) and caught.value.expected


def test_recomputation_is_refused_where_it_cannot_be_had() -> None:
    """`always` is refused by name, never ignored: in a cache that no compiled model's `generate` allocates."""
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(NotAvailableError, match=r"'recompute' is not available yet .* only generate\(\)"):
        alisa_compile.AlisaCache(config, recompute="always", batch_size=1)


def test_budgets_and_the_disk_are_available() -> None:
    """However small: what is too little is found where the sizes are known."""
    options = {"device_kv_budget": 0, "host_kv_budget": "1GiB", "disk_kv_budget": "auto", "disk_path": "/tmp"}
    config = AlisaConfig.from_options(options)
    assert [config.budget_bytes(name) for name in ("device_kv_budget", "host_kv_budget")] == [0, 1 << 30]


@pytest.mark.parametrize("name", ("device_kv_budget", "host_kv_budget", "disk_kv_budget"))
@pytest.mark.parametrize(
    ("value", "count"),
    (
        ("auto", None),
        (0, 0),
        (12345, 12345),
        ("6GiB", 6 << 30),
        ("512 MiB", 512 << 20),
        ("1.5gib", 3 << 29),
        ("2 TiB", 2 << 40),
        ("64KiB", 64 << 10),
        ("3GB", 3 * 10**9),
        ("7k", 7000),
        ("10M", 10**7),
        (" 100 B ", 100),
        ("100", 100),
        ("0.1GB", 10**8),
    ),
)
def test_budget(name: str, value: Any, count: int | None) -> None:
    """Powers of 1024 with an i, of 1000 without; exact, also where a float is not."""
    assert AlisaConfig.from_options({name: value}).budget_bytes(name) == count


@pytest.mark.parametrize("value", (-1, True, 1.5, None, "", "GiB", "-1GiB", "6 apples", "1e9", "5i", "5iB", "1,5GiB"))
def test_budget_that_is_none(value: Any) -> None:
    text = "option 'host_kv_budget' is not a number of bytes.*expected: 'auto', an integer >= 0, or text such as '6GiB'"
    with pytest.raises(ConfigError, match=text) as caught:
        AlisaConfig(host_kv_budget=value)
    assert caught.value.got == repr(value)


def test_disk_path_that_is_none() -> None:
    with pytest.raises(ConfigError, match="'disk_path' is not a folder; got: 3"):
        AlisaConfig.from_options({"disk_path": 3})


def test_every_option_is_used() -> None:
    """No option may be accepted and ignored: each is read somewhere outside config.py."""
    fields = {field.name for field in dataclasses.fields(AlisaConfig)}
    sources = sorted(Path(alisa_compile.__file__).parent.rglob("*.py"))
    text = "".join(path.read_text(encoding="utf-8") for path in sources if path.name != "config.py")
    through_a_property = {"policy": "is_sparse", "sparsity": "keep_ratio", **dict.fromkeys(BUDGETS, "budget_bytes")}
    read = {name: through_a_property.get(name, name) for name in fields}
    ignored = sorted(name for name, used in read.items() if not re.search(rf"(config|options)\.{used}\b", text))
    assert not ignored, f"accepted but read nowhere: {ignored}"


def test_keep_ratio_is_the_decimal_that_was_written() -> None:
    """1 - 0.8 is one fifth, not the nearest binary fraction."""
    assert AlisaConfig(sparsity=0.8).keep_ratio == Fraction(1, 5)
    assert AlisaConfig(sparsity=0.9).keep_ratio == Fraction(1, 10)


def test_dense_policy_is_never_sparse() -> None:
    assert not AlisaConfig(policy="dense", sparsity=0.8).is_sparse


def test_error_types() -> None:
    """Every error is an AlisaError and the built-in that a caller would think of."""
    for kind, builtin in (
        (ConfigError, ValueError),
        (NotAvailableError, NotImplementedError),
        (CacheError, RuntimeError),
        (GraphError, RuntimeError),
        (ProfileError, ValueError),
    ):
        error = kind("what", got=0, expected="more", fix="do this")
        assert isinstance(error, (AlisaError, builtin)) and issubclass(kind, AlisaError) and issubclass(kind, builtin)
        assert str(error) == "what; got: 0; expected: more; to fix: do this"
    assert str(AlisaError("only what")) == "only what"
    infeasible = InfeasibleError("what", smallest_budgets={"host": 7}, longest_context=9, fix="do this")
    assert isinstance(infeasible, (AlisaError, ValueError)) and str(infeasible) == "what; to fix: do this"
    assert (infeasible.smallest_budgets, infeasible.longest_context) == ({"host": 7}, 9)
