"""The ledger: watch the symmetries of any training run."""

from noetherflow.monitor.ledger import Ledger

__all__ = ["Ledger"]
