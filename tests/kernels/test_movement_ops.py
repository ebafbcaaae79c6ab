"""torch's own checks of the ops that move rows on a GPU, and their references by hand."""

from __future__ import annotations

import torch

from alisa_compile import kernels  # noqa: F401  (registers the ops)

ops = torch.ops.alisa


def _check(op: object, *args: object) -> None:
    results = torch.library.opcheck(op, args)  # type: ignore[arg-type]
    assert set(results.values()) == {"SUCCESS"}, results


def test_copy_rows() -> None:
    """Rows with a negative slot on either side stay behind; strided pools and no rows at all are fine."""
    source, target = torch.arange(12.0).view(4, 3), torch.zeros(5, 3)
    ops.copy_rows(source, torch.tensor([3, -1, 0]), target, torch.tensor([0, 1, -1]))
    assert target.tolist() == [[9.0, 10.0, 11.0], *[[0.0, 0.0, 0.0]] * 4]
    for index in (torch.int32, torch.int64):
        _check(ops.copy_rows.default, source, torch.tensor([1, -1], dtype=index), target, torch.tensor([2, 3]))
    _check(ops.copy_rows.default, torch.zeros(4, 6)[:, ::2], torch.tensor([1]), target, torch.tensor([2]))
    _check(ops.copy_rows.default, source, torch.zeros(0, dtype=torch.int32), target, torch.zeros(0, dtype=torch.int32))


def test_assign_slots() -> None:
    """Two rows enter: one takes the free slot, one that of a row that is not wanted, and the coming token the last."""
    table = torch.full((1, 1, 1, 10), -1, dtype=torch.int32)
    owner = torch.tensor([2, -1, 5, 3, 6], dtype=torch.int32)  # of positions 0 to 6; below the device: 0 to 5
    for slot, position in enumerate(owner.tolist()):
        if position >= 0:
            table[..., position] = slot
    rows = torch.tensor([[[[0, 1, 3, 6, 7, 0]]]], dtype=torch.int32)
    counts, tally = torch.tensor([[[5]]], dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    regions = torch.zeros((1, 1, 1), dtype=torch.int64)
    arguments = (table, owner, tally, regions, rows, counts, 0, 7, 6)
    for selection in ((rows, counts), (None, None)):
        _check(ops.assign_slots.default, *(t.clone() for t in arguments[:4]), *selection, 0, 7, 6)
    slots, positions = ops.assign_slots(*arguments)
    assert slots.flatten().tolist() == [1, 0, -1, -1, -1] and positions.flatten().tolist() == [0, 1, -1, -1, -1]
    assert owner.tolist() == [1, 0, 7, 3, 6]
    assert table.flatten().tolist() == [1, 0, -1, 3, -1, -1, 4, 2, -1, -1]
    assert tally.tolist() == [2, 0]
