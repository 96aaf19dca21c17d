"""The ledger: watch the symmetries of any training run; balance at given steps of it."""

from noetherflow.monitor.ledger import Ledger
from noetherflow.monitor.rebalance import BalanceSchedule

__all__ = ["BalanceSchedule", "Ledger"]
