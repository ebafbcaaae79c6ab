"""The cost expressions: the paper's own formulas at numbers worked out by hand, and what they reduce to."""

from __future__ import annotations

import numpy as np
import pytest
import sympy as sp

from alisa_compile.runtime import cost


def test_bytes_of_a_position() -> None:
    """4blh, checked against the paper: OPT-13B, b = 64, 512 tokens take more than 25 GB."""
    assert sp.expand(4 * cost.b * cost.l * cost.h - cost.PAPER_POSITION) == 0
    position = cost.compiled(cost.PAPER_POSITION)(b=64, l=40, h=5120)
    assert position == 52_428_800 and 26e9 < 512 * position < 27e9


def test_tokens_moved_out() -> None:
    """alpha (s + j) old positions, and resident ones to spare; only what is new among them is written."""
    moved = cost.compiled(cost.THETA_C)
    first = moved(alpha=0.25, s=96, j=4, spare=10, old_before=0, deleted=0)
    assert first == 0.25 * 100 + 10  # the bulk copy at p1
    assert moved(alpha=26 / 101, s=96, j=5, spare=10, old_before=35, deleted=0) == pytest.approx(1)
    assert moved(alpha=0.25, s=96, j=4, spare=10, old_before=0, deleted=20) == 15  # what is deleted at once is not
    assert moved(alpha=0.1, s=96, j=4, spare=0, old_before=35, deleted=0) == 0  # fewer old ones: nothing comes by it
    nothing = {cost.spare: 0, cost.old_before: 0, cost.deleted: 0}
    assert sp.simplify(cost.THETA_C.subs(nothing)) == cost.alpha * cost.CONTEXT


def test_tokens_moved_in() -> None:
    """churn x P(not resident) of the coming dynamic rows; where layers refresh, all that is not resident."""
    moved = cost.compiled(cost.THETA_G)
    numbers = {"alpha": 0.4, "s": 90, "j": 10, "w": 21, "g": 10, "spare": 11, "seeds": 0}
    assert moved(**numbers, churn=0.5, refresh=0, refresh_next=0) == pytest.approx(10 * 0.5 * 40 / 80)
    assert moved(**numbers, churn=0.5, refresh=1, refresh_next=1) == pytest.approx(40)
    assert moved(**numbers, churn=0.5, refresh=0.5, refresh_next=0.25) == pytest.approx(0.75 * 2.5 + 0.5 * 40)
    assert moved(**{**numbers, "alpha": 0.0}, churn=1, refresh=1, refresh_next=0) == 0
    # After a prompt longer than the device, 51 of the 90 positions that are not local are old.
    assert moved(**{**numbers, "seeds": 1}, churn=0, refresh=0, refresh_next=0) == pytest.approx(10 * 51 / 90)
    # P is a probability: with only the working set resident, every other row is missing.
    assert cost.compiled(cost.P_NOT_RESIDENT)(alpha=0.8, s=90, j=10, w=21) == 1


def test_transfer_reduces_to_the_paper() -> None:
    """Rows of 4blh bytes, one bandwidth and nothing deleted: T_m = 4blh (theta_c + theta_g) / B."""
    ours = cost.TRANSFER.subs(
        {cost.kv: cost.PAPER_POSITION, cost.B_up: cost.B, cost.B_down: cost.B, cost.beta: 0, cost.deleted: 0}
    )
    paper = cost.PAPER_TRANSFER.subs({cost.deleted: 0})
    assert sp.simplify(ours - paper) == 0
    assert {cost.s, cost.j, cost.b, cost.l, cost.h, cost.alpha, cost.B} <= paper.free_symbols


def test_rebuilt_rows_cost_their_hidden_states() -> None:
    """Half of the old positions deleted: half of what is needed comes as hidden states, over their own rate."""
    numbers = {
        "alpha": 0.4, "beta": 0.2, "s": 90, "j": 10, "w": 20, "g": 0, "churn": 0, "refresh": 1,
        "refresh_next": 1, "spare": 0, "seeds": 0,
        "old_before": 40, "deleted": 20, "kv": 100, "hidden": 50, "B_down": 1, "B_up": 10, "B_hidden": 5,
    }  # fmt: skip
    assert cost.compiled(cost.DELETED_SHARE)(**numbers) == pytest.approx(0.5)
    assert cost.compiled(cost.TRANSFER)(**numbers) == pytest.approx(100 * 20 / 10 + 50 * 20 / 5)


def test_objectives() -> None:
    numbers = {"T_c": np.array([3.0, 1.0]), "T_r": np.array([1.0, 1.0]), "T_m": np.array([2.0, 5.0])}
    assert cost.compiled(cost.OBJECTIVES["paper"])(**numbers).tolist() == [6, 7]
    overlapped = cost.compiled(cost.OBJECTIVES["overlapped"])
    assert overlapped(**numbers, T_s=np.zeros(2)).tolist() == [4, 5]
    assert overlapped(**numbers, T_s=np.array([2.0, 1.0])).tolist() == [6, 5]  # attention waits for what streams


def test_over_steps() -> None:
    """Functions take arrays, one entry a step, and ignore what they do not need."""
    steps = np.arange(4)
    assert cost.compiled(cost.CONTEXT)(s=10, j=steps, alpha=None).tolist() == [10, 11, 12, 13]
    assert cost.compiled(cost.CONTEXT) is cost.compiled(cost.CONTEXT)
