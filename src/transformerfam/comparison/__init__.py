"""The paper's comparison: every system trained and asked alike, on one command that can be stopped and resumed.

`plan` says what a comparison is, `names` what its runs are called, `load` reads its file; `schedule` keeps its runs
going, each in its own process; `run` trains and asks one system; `questions` says which questions belong to it;
`report` and `figures` show what the rows say. What is asked, and how it is shown, is a task's: `passkey`, `named_keys`
and `facts`.

May import: `training`, `tasks`, `weights`, `rivals`, `reports`, and the root of the package.
One more task: a class in a module here (of `AccuracyComparison`, where answers are right or wrong), and its name in the
task's line of `tasks.registry`. One more system: a preset in `rivals.presets` or a module in `rivals`, and its name in
the file.
"""

from transformerfam.comparison.load import load_comparison
from transformerfam.comparison.names import RunName
from transformerfam.comparison.plan import Comparison
from transformerfam.comparison.run import run_one
from transformerfam.comparison.schedule import run_all

__all__ = ["Comparison", "RunName", "load_comparison", "run_all", "run_one"]
