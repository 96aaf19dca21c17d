"""Pages and live views of what was measured; no maths."""

from noetherflow.report.page import Figure, Section, write_page
from noetherflow.report.run import write_run_report
from noetherflow.report.watch import watch

__all__ = ["Figure", "Section", "watch", "write_page", "write_run_report"]
