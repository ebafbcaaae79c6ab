"""alisa: a `torch.compile` backend that generates through its own KV store.

model = torch.compile(model, backend="alisa", options={"sparsity": 0.8})
model.generate(...)
print(alisa_compile.report(model))
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from . import kernels as _kernels  # noqa: F401  (registers the alisa:: ops)
from .api import diff, disable, enable, plan, record, release, report, trace
from .config import AlisaConfig
from .errors import AlisaError, CacheError, ConfigError, InfeasibleError, NotAvailableError, ProfileError, TierError

if TYPE_CHECKING:
    from .hf.cache import AlisaCache

__version__ = "0.1.0"
__all__ = [
    "AlisaCache",
    "AlisaConfig",
    "AlisaError",
    "CacheError",
    "ConfigError",
    "InfeasibleError",
    "NotAvailableError",
    "ProfileError",
    "TierError",
    "diff",
    "disable",
    "enable",
    "plan",
    "record",
    "release",
    "report",
    "trace",
]

# `torch.compile(..., backend="alisa")` imports this package through its entry point, which makes this the one place
# where the transformers hook can install itself without any code of the user's.
if importlib.util.find_spec("transformers") is not None:
    from . import hf as _hf

    _hf.install()


def __getattr__(name: str) -> Any:
    if name == "AlisaCache":
        try:
            from .hf.cache import AlisaCache
        except ModuleNotFoundError as error:
            raise AlisaError("AlisaCache needs transformers", fix="pip install 'alisa-compile[hf]'") from error
        return AlisaCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
