"""Reports: raw rows in, tables and figures out."""

from transformerfam.reports.rows import Accuracy, RowFile, accuracy_by_length, read_rows, wilson_interval

__all__ = ["Accuracy", "RowFile", "accuracy_by_length", "read_rows", "wilson_interval"]
