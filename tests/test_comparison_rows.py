"""Forecasts beside rows of charges alone, as a recorder that is no ledger keeps them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from noetherflow.equilibrium.comparison import compared


@pytest.mark.parametrize("change", [{}, {"change": 0.5}])
def test_rows_need_not_tell_the_change_of_their_step(change):
    rows = [{"symmetry": "s", "step": 0, "charge": 1.0, **change}]
    sums = [SimpleNamespace(name="s", step=step, value=1.2, error=0.1) for step in (0, 1)]
    found = compared("symmetry", sums, rows, None)
    assert len(found.charges) == 1 + len(change)
