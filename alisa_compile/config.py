"""Options: one frozen dataclass, validated once, shared by the backend, the cache and the command line."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from .errors import ConfigError

POLICIES = ("swa", "dense", "local", "strided", "h2o", "churn")
INNER_COMPILERS = ("inductor", "aot_eager", "eager")
BUDGETS = ("device_kv_budget", "host_kv_budget", "disk_kv_budget")
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclasses.dataclass(frozen=True)
class AlisaConfig:
    """What a user can set, with the names of `options={...}` and of the command line flags.

    sparsity: fraction of past tokens that a decode step leaves out, in [0, 1). 0 is dense attention, exactly.
    policy: how the kept tokens are chosen: `swa` (sparse window attention), `dense`, the baselines `local`, `strided`
        and `h2o`, or `churn` (pseudo-random, for tests). `window`, `sinks` and `refresh` are parameters of `swa` alone,
        `local_fraction` of `swa` and `h2o`.
    paper: Algorithm 1 of ALISA (ISCA 2024) as printed; sets window, head_mode, sinks, refresh, local_fraction and
        max_rows.
    window: decay constant in steps of the attention mass that ranks tokens (paper mode: the last k rows instead).
    head_mode: `shared` = one kept set per layer and sequence; `per_kv_head` = one per KV head.
    sinks: first tokens that are always kept.
    refresh: every this many steps a layer attends to everything once, so that dropped tokens can return; 0 = never.
    local_fraction: share of the kept rows reserved for the most recent tokens.
    max_rows: cap on the kept rows; `auto` = grow with the context until a device budget caps it; None = never.
    max_length: tokens to make room for; default: what `generate` knows, else a small start that doubles.
    kv_dtype: `auto` (the model's dtype) or `int8` (symmetric, one float32 scale per token and KV head).
    device_kv_budget, host_kv_budget, disk_kv_budget: hard limits of each tier: `auto`, bytes, or text such as 6GiB.
        They count all that the store keeps, rows, tables, scores and staging.
    disk_path: a folder for the file of the disk tier, which no other process can open; default: that for temporary
        files.
    recompute: what happens to the oldest rows below the device where host and disk are full. `auto`: they are deleted,
        and rebuilt from saved layer inputs when needed, if those take less memory; `off`: never; `always`: every row
        that leaves the device. In caches that `generate` of a compiled model allocates, on CPUs.
    validate: first decode steps of a `generate` that run a second time, dense: the report says how they differ.
        Needs all K and V on the device once more, until those steps are over.
    inner_compiler: what compiles the rewritten graph: `inductor`, or for debugging `aot_eager` or `eager`.
    """

    sparsity: float = 0.8
    policy: str = "swa"
    paper: bool = False
    window: int = 8
    head_mode: str = "shared"
    sinks: int = 4
    refresh: int = 32
    local_fraction: float = 0.5
    max_rows: int | str | None = "auto"
    max_length: int | None = None
    kv_dtype: str = "auto"
    device_kv_budget: int | str = "auto"
    host_kv_budget: int | str = "auto"
    disk_kv_budget: int | str = 0
    disk_path: str | None = None
    recompute: str = "auto"
    validate: int = 0
    inner_compiler: str = "inductor"

    def __post_init__(self) -> None:
        _number("sparsity", self.sparsity, "a number in [0, 1)", lambda x: 0 <= x < 1)
        _number("local_fraction", self.local_fraction, "a number in (0, 1)", lambda x: 0 < x < 1)
        _one_of("policy", self.policy, POLICIES)
        _one_of("head_mode", self.head_mode, ("shared", "per_kv_head"))
        _one_of("kv_dtype", self.kv_dtype, ("auto", "int8"))
        _one_of("recompute", self.recompute, ("auto", "off", "always"))
        _one_of("inner_compiler", self.inner_compiler, INNER_COMPILERS)
        for name, lowest in (("window", 2), ("sinks", 0), ("refresh", 0), ("validate", 0)):
            _integer(name, getattr(self, name), lowest)
        if self.max_length is not None:
            _integer("max_length", self.max_length, 1)
        if not (self.max_rows is None or self.max_rows == "auto"):
            _integer("max_rows", self.max_rows, 2)
        if not isinstance(self.paper, bool):
            raise ConfigError("option 'paper' is not a flag", got=repr(self.paper), expected="True or False")
        for name in BUDGETS:
            self.budget_bytes(name)
        if not (self.disk_path is None or isinstance(self.disk_path, str)):
            raise ConfigError("option 'disk_path' is not a folder", got=repr(self.disk_path), expected="None or text")

    def budget_bytes(self, name: str) -> int | None:
        """One of the three budgets in bytes; None = `auto`."""
        value = getattr(self, name)
        if value == "auto":
            return None
        if isinstance(value, str):
            found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", value.strip().lower())
            if found is not None and found[2] in _UNITS:
                return int(Fraction(found[1]) * _UNITS[found[2]])
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        raise ConfigError(
            f"option {name!r} is not a number of bytes",
            got=repr(value),
            expected="'auto', an integer >= 0, or text such as '6GiB' or '512 MiB'",
        )

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None = None) -> AlisaConfig:
        """Build from `options={...}`; an unknown name is an error that offers the nearest one."""
        options = dict(options or {})
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=2, cutoff=0.5)
                hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else "see AlisaConfig's docstring"
                raise ConfigError(f"unknown option {name!r}", expected=f"one of {', '.join(known)}", fix=hint)
        return cls(**options)

    @property
    def is_sparse(self) -> bool:
        """Whether decode leaves rows out: sparsity 0 and the dense policy bypass selection altogether."""
        return self.policy != "dense" and self.sparsity > 0

    @property
    def keep_ratio(self) -> Fraction:
        """1 - sparsity as the decimal fraction that was written (0.8 means exactly 4/5, not its float)."""
        return 1 - Fraction(str(self.sparsity))


def _number(name: str, value: object, expected: str, accepts: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not accepts(value):
        raise ConfigError(f"option {name!r} is out of range", got=repr(value), expected=expected)


def _integer(name: str, value: object, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ConfigError(f"option {name!r} is out of range", got=repr(value), expected=f"an integer >= {lowest}")


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        fix = f"did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"option {name!r} has an unknown value",
            got=repr(value),
            expected=f"one of {', '.join(choices)}",
            fix=fix,
        )
