"""What a decode step costs, as expressions in the notation of ALISA (ISCA 2024), compiled to NumPy functions.

The paper's symbols: s prompt length, j step, b batch, l layers, h hidden size, alpha and beta the shares of all
positions that are not on the device and that were deleted, B the bandwidth of the link.

Where the paper is silent or assumes too much:
- Bytes of a position are symbols of their own (`kv`, and `hidden` for the saved layer inputs that K and V are rebuilt
  from), because rows may be int8 with scales, or have fewer heads than the model's queries: `PAPER_POSITION` is 4blh.
- The paper moves alpha (s + j) tokens out in every step. Here a row is written once: what leaves is the difference
  between the old positions of two steps (the non-resident ones, and `spare` resident ones whose copy below stays valid,
  so that the coming step's dynamic rows and its new token can have their slots).
- The paper has no formula for the tokens that come back. Here: churn x P(not resident) of the dynamic rows of the
  coming step, after a prompt longer than the device the share of them that is old, and in the layers that refresh every
  non-resident row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import sympy as sp

s, j, b, l, h = sp.symbols("s j b l h", positive=True)  # noqa: E741  (the paper's l)
alpha, beta = sp.symbols("alpha beta", nonnegative=True)
B = sp.Symbol("B", positive=True)

#: Of the coming step: working-set rows, the dynamic ones among them, and the share of these that are new.
w, g, churn = sp.symbols("w g churn", nonnegative=True)
#: Share of the layers that refresh in this step and in the coming one.
refresh, refresh_next = sp.symbols("refresh refresh_next", nonnegative=True)
#: Resident positions that are old, and 1 where a prompt longer than the device has just seeded the dynamic rows.
spare, seeds = sp.symbols("spare seeds", nonnegative=True)
#: Old positions and deleted ones: those of the step before, and the deleted number now.
old_before, deleted = sp.symbols("old_before deleted", nonnegative=True)
#: Bytes of one position of all layers and sequences as stored, and of the hidden states it can be rebuilt from.
kv, hidden = sp.symbols("kv hidden", nonnegative=True)
#: Bytes a second: rows to the host, rows from it, hidden states from it.
B_down, B_up, B_hidden = sp.symbols("B_down B_up B_hidden", positive=True)
#: Seconds that compute, recomputation and transfers take, and of the transfers those that attention waits for.
T_c, T_r, T_m, T_s = sp.symbols("T_c T_r T_m T_s", nonnegative=True)

CONTEXT = s + j
PAPER_POSITION = 4 * b * l * h
#: Positions with a copy below the device after the step.
OLD = alpha * CONTEXT + spare
#: Tokens moved out. Deleted positions are the oldest; one that is deleted at once is never written.
THETA_C = sp.Max(OLD - sp.Max(old_before, deleted), 0)
#: Tokens needed from below: the new dynamic rows that are not resident, and where layers refresh, all that are not.
P_NOT_RESIDENT = alpha * CONTEXT / sp.Max(CONTEXT + 1 - w, 1)
P_OLD = OLD / sp.Max(CONTEXT + 1 - w + g, 1)
THETA_CHURN = churn * g * P_NOT_RESIDENT + seeds * g * P_OLD
THETA_REFRESH = alpha * CONTEXT
THETA_G = (1 - refresh_next) * THETA_CHURN + refresh * THETA_REFRESH
#: Which of them are rebuilt instead of loaded: as many as were deleted among the old ones.
DELETED_SHARE = beta * CONTEXT / sp.Max(OLD, 1)
LOADED = THETA_G * (1 - DELETED_SHARE)
REBUILT = THETA_G * DELETED_SHARE

#: Time on the link: the paper's form (one bandwidth, 4blh bytes, nothing deleted), and ours.
PAPER_TRANSFER = PAPER_POSITION * (THETA_C + THETA_G) / B
TRANSFER = kv * THETA_C / B_down + kv * LOADED / B_up + hidden * REBUILT / B_hidden

#: Of that, what the step itself needs: where layers refresh, rows stream in while attention waits for them.
STREAM = refresh * THETA_REFRESH * (kv * (1 - DELETED_SHARE) / B_up + hidden * DELETED_SHARE / B_hidden)

#: Time of a step. The paper adds; a transfer for the coming step hides behind the compute.
OBJECTIVES = {"paper": T_c + T_r + T_m, "overlapped": sp.Max(T_c + T_r + T_s, T_m)}


@functools.cache
def compiled(expression: Any) -> Callable[..., Any]:
    """A NumPy function of an expression; its arguments are named by the symbols and may be arrays over steps."""
    symbols = sorted(expression.free_symbols, key=str)
    function: Callable[..., Any] = sp.lambdify(symbols, expression, "numpy")
    names = [str(symbol) for symbol in symbols]

    def evaluate(**values: Any) -> Any:
        return function(*(values[name] for name in names))

    return evaluate
