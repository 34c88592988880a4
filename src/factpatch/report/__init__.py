"""Reports on a store of results: tables, plots, one page."""

from factpatch.report.rows import EditRow, ResultRow, edit_rows, result_rows, table_rows
from factpatch.report.stats import Difference, bootstrap, difference

__all__ = ["Difference", "EditRow", "ResultRow", "bootstrap", "difference", "edit_rows", "result_rows", "table_rows"]
