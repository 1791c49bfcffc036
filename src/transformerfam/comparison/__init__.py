"""The paper's comparison: every system trained and asked alike, on one command that can be stopped and resumed.

`plan` reads the file of a comparison; `schedule` keeps its runs going, each in its own process; `run` trains and
asks one system; `questions` says which questions belong to it; `report` and `figures` show what the rows say.

May import: `training`, `tasks`, `weights`, `rivals`, `reports`, and the root of the package.
One more system: a preset in `rivals.presets` or a module in `rivals`, and its name in the comparison's file.
"""

from transformerfam.comparison.plan import Comparison, RunName, load_comparison
from transformerfam.comparison.run import run_one
from transformerfam.comparison.schedule import run_all

__all__ = ["Comparison", "RunName", "load_comparison", "run_all", "run_one"]
