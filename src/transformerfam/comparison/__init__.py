"""The paper's comparison: every system trained and asked alike, on one command that can be stopped and resumed."""

from transformerfam.comparison.plan import Comparison, RunName, load_comparison
from transformerfam.comparison.run import run_one
from transformerfam.comparison.schedule import run_all

__all__ = ["Comparison", "RunName", "load_comparison", "run_all", "run_one"]
