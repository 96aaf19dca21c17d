"""Pieces of the ledger against plain loops: sums in pieces, tables of mixed values, the ring of pages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from noetherflow.monitor.books import FIELDS, Columns, History, Page
from noetherflow.monitor.charge_map import axis_sums
from noetherflow.monitor.sums import tabulate


@pytest.mark.parametrize("axes", [(0,), (1,), (-1,), (0, 2), (2, 1), (0, 1, 2)])
@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_sums_in_pieces_equal_whole_sums(axes: tuple[int, ...], piece: int) -> None:
    rng = torch.Generator(torch.get_default_device()).manual_seed(0)
    a, b = (torch.randn(5, 4, 3, dtype=torch.float64, generator=rng) for _ in range(2))
    over = tuple(d for d in range(3) if d not in [x % 3 for x in axes])
    expected = (a * b).sum(over, keepdim=True) if over else a * b
    torch.testing.assert_close(axis_sums(a, b, axes, piece), expected, rtol=1e-14, atol=1e-14)


def test_table_of_numbers_and_tensors() -> None:
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([[3.0], [4.0]])
    rows = [[[first, 7.0], [second, 8.0]], [[0.5, torch.tensor(9.0)], [0.0, 1.0]]]
    expected = [[[1, 2, 7], [3, 4, 8]], [[0.5, 0.5, 9], [0, 0, 1]]]
    np.testing.assert_array_equal(tabulate(rows, [2, 1]), expected)
    np.testing.assert_array_equal(tabulate([[[1.0, 2.0], [3.0, 4.0]]], [1, 1]), [[[1, 2], [3, 4]]])


def page(start: int, stop: int) -> Page:
    steps = np.arange(start, stop)
    table = np.broadcast_to(steps[None, :, None], (len(FIELDS), len(steps), 2)).astype(float)
    return Page(steps, steps / 10, np.where(steps % 2, np.nan, steps), {"family": Columns(table)})


def test_history_keeps_the_last_steps_and_rewinds() -> None:
    history = History(5)
    for start in range(0, 12, 3):
        history.add(page(start, start + 3))
    found = list(history.rows("family"))
    assert [step for step, _, _ in found] == [7, 8, 9, 10, 11]
    assert all(row["charge"].tolist() == [step, step] and lr == step / 10 for step, lr, row in found)
    assert history.losses() == {8: 8.0, 10: 10.0}
    history.rewind(9)
    assert [step for step, _, _ in history.rows("family")] == [7, 8]
    assert history.losses() == {8: 8.0}
    history.add(page(9, 30))
    assert [step for step, _, _ in history.rows("family")] == [25, 26, 27, 28, 29]


def test_rows_for_the_log_have_no_infinities() -> None:
    table = np.zeros((len(FIELDS), 2, 1))
    table[0, 1, 0] = np.inf
    first, second = Columns(table).listed()
    assert first["charge"] == [0.0]
    assert second["charge"] == [None]
