"""Reports: raw rows in, tables and figures out.

`rows` reads and writes the JSON lines of all measurements, one row per question, and reads compressed ones; `accuracy`
counts, `telling` is how a row gives its key; `passkey` and `next_token` make tables, `figure` draws and `markdown`
writes what carries this package's mark.

May import: the root of the package.
One more table: a module that takes rows, and its line in `cli.report`.
"""

from transformerfam.reports.accuracy import Accuracy, accuracy_by_length, wilson_interval
from transformerfam.reports.rows import RowFile, read_rows

__all__ = ["Accuracy", "RowFile", "accuracy_by_length", "read_rows", "wilson_interval"]
