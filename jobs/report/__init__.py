"""The report: one self-contained HTML page about a run or a sweep."""

from jobs.report.page import write_report

__all__ = ["write_report"]
