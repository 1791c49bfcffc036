"""Run all of a comparison, some runs side by side, without supervision: doit decides what is left to do and does it.

Every run has its own process and its own log. What is finished is in one file of rows, by which a
stopped comparison resumes.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from transformerfam.comparison.names import RunName
from transformerfam.comparison.plan import UNTRAINED, Comparison
from transformerfam.comparison.questions import Questions
from transformerfam.comparison.run import ROWS_FILE, is_finished, require_same_recipe, run_folder
from transformerfam.errors import MissingPackageError, TransformerFamError
from transformerfam.files.writing import make_folder
from transformerfam.processes import INTERRUPTED
from transformerfam.reports.rows import RowFile, fields_of_rows, read_rows
from transformerfam.training.checkpoint import last_log_row
from transformerfam.training.run_folder import LOG_FILE

RUN_LOG = "run.log"
WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
Watch = Callable[[Callable[[], Table]], AbstractContextManager[None]]
"""Shows, in its body, a table that a function gives as it is at the time."""


class Schedule:
    """The runs of one comparison, and how far each is.

    Args:
        comparison: what is to be done.
        folder: where the runs go.
        rows: file of the finished runs' rows.
        command: the command of one run, to which its name is added.
        num_jobs: runs at a time.
        watch: shows how far each is; None: nothing does.
    """

    def __init__(
        self,
        comparison: Comparison,
        folder: Path,
        rows: Path,
        command: Sequence[str],
        num_jobs: int = 2,
        watch: Watch | None = None,
    ) -> None:
        self.comparison, self.folder, self.rows_path = comparison, folder, rows
        self.command, self.num_jobs, self.watch = list(command), num_jobs, watch
        self.num_steps = {run: comparison.recipe_of(run).schedule.steps for run in comparison.runs}
        self.states: dict[RunName, str] = dict.fromkeys(comparison.runs, WAITING)
        self.begun: dict[RunName, float] = {}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.seconds: list[float] = []  # of the runs that were finished here

    def run(self) -> list[RunName]:
        """Do what is not done yet, and return the runs that failed.

        Raises:
            MissingPackageError: doit is not installed.
            RecipeError: the file of rows holds runs of another recipe.
            TransformerFamError: a question cannot be asked; nothing is trained.
            KeyboardInterrupt: Ctrl-C; every run has saved what it has, and the same call resumes.
        """
        try:
            from doit.cmd_base import ModuleTaskLoader
            from doit.doit_cmd import DoitMain
        except ImportError as error:
            raise MissingPackageError(
                "a comparison needs the package doit, which is not installed; install it with: "
                "pip install 'transformerfam[compare]'"
            ) from error
        Questions(self.comparison).require_askable()
        make_folder(self.folder)
        with ExitStack() as stack:
            self.rows = stack.enter_context(RowFile(self.rows_path))
            with fields_of_rows():
                require_same_recipe(self.comparison, self.rows.rows)
            tasks = {"task_compare": self._tasks, "DOIT_CONFIG": self._doit_config()}
            stack.enter_context(nullcontext() if self.watch is None else self.watch(self.table))
            try:
                code = DoitMain(ModuleTaskLoader(tasks), config_filenames=()).run(["run"])
            finally:
                for process in self.processes:
                    process.communicate()  # closes its input first
        if RUNNING in self.states.values():
            raise KeyboardInterrupt
        failed = [run for run, state in self.states.items() if state == FAILED]
        if WAITING in self.states.values():
            raise TransformerFamError(
                f"the scheduler doit ended with code {code} before all was done; see what it said"
            )
        return failed

    def _doit_config(self) -> dict[str, Any]:
        return {
            "dep_file": str(self.folder / "doit.json"),
            "backend": "json",
            "num_process": self.num_jobs,
            "par_type": "thread",
            "continue": True,
            "reporter": _SilentReporter,
            "verbosity": 0,
        }

    def _tasks(self) -> Iterator[dict[str, Any]]:
        for run in self.comparison.runs:
            yield {
                "name": str(run),
                "actions": [(self._run, [run])],
                "uptodate": [self._is_done(run)],
                "io": {"capture": False},  # which would replace the streams of all threads
            }

    def _is_done(self, run: RunName) -> Callable[[], bool]:
        def check() -> bool:
            done = is_finished(self.comparison, run, self.rows.rows)
            self.states[run] = DONE if done else self.states[run]
            return done

        return check

    def _run(self, run: RunName) -> bool:
        """Start a run's process, wait for it, and keep its rows."""
        self.states[run], self.begun[run] = RUNNING, time.monotonic()
        folder = run_folder(self.folder, run)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / RUN_LOG).open("ab") as log:
            # Its input ends when this process does, however it ends, and the run with it.
            process = subprocess.Popen([*self.command, str(run)], stdin=subprocess.PIPE, stdout=log, stderr=log)
            self.processes.append(process)
            code = process.wait()
            process.communicate()  # closes its input
        if code == INTERRUPTED:
            return False
        if code != 0:
            self.states[run] = FAILED
            return False
        for row in read_rows([folder / ROWS_FILE]):
            if row not in self.rows.rows:  # a scheduler that was killed here left some of them
                self.rows.append(row)
        self.states[run] = DONE
        self.seconds.append(time.monotonic() - self.begun[run])
        return True

    # What it shows

    def table(self) -> Table:
        """Return what is done, what runs and what is left, with the time that it will take."""
        counts = {state: list(self.states.values()).count(state) for state in (DONE, RUNNING, WAITING, FAILED)}
        caption = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
        left = self.seconds_left()
        if left is not None:
            caption += f"; about {left / 3600:.1f} h left"
        table = Table(title=f"comparison {self.comparison.name}", caption=caption)
        table.add_column("system")
        for seed in self.comparison.seeds:
            table.add_column(f"seed {seed}", justify="right")
        for system in dict.fromkeys(run.system for run in self.comparison.runs):
            table.add_row(system, *(self._cell(RunName(system, seed)) for seed in self.comparison.seeds))
        return table

    def seconds_left(self) -> float | None:
        """Return how long the rest will take, going by the runs that were finished here; None before the first."""
        if not self.seconds:
            return None
        mean = sum(self.seconds) / len(self.seconds)
        running = sum(
            max(0.0, mean - (time.monotonic() - self.begun[run])) for run, s in self.states.items() if s == RUNNING
        )
        waiting = sum(state == WAITING for state in self.states.values())
        return (waiting * mean + running) / self.num_jobs

    def _cell(self, run: RunName) -> str:
        state = self.states[run]
        if state == FAILED:
            return f"failed, see {run}/{RUN_LOG}"
        if state != RUNNING:
            return state
        folder = run_folder(self.folder, run)
        if (folder / ROWS_FILE).exists():
            questions = Questions(self.comparison)
            asked = questions.num_answered(read_rows([folder / ROWS_FILE]), run)
            return f"asked {asked} of {questions.num_asked(run)}"
        row = last_log_row(folder / LOG_FILE)
        if row is None:
            return "asking" if self.comparison.system_of(run.system) == UNTRAINED else "starting"
        keys = "-" if row.get("key_accuracy") is None else f"{row['key_accuracy']:.2f}"
        return f"step {row['step']} of {self.num_steps[run]}, keys {keys}"


class _SilentReporter:
    """Say nothing, since the table shows it; the output of a run is in its log."""

    desc = "nothing"

    def __init__(self, outstream: Any, options: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None

    def runtime_error(self, message: str) -> None:
        """Hand an error of the scheduler itself on.

        Raises:
            TransformerFamError: always.
        """
        raise TransformerFamError(f"the scheduler failed: {message}")


def run_all(
    comparison: Comparison,
    source: Path,
    folder: Path,
    rows: Path,
    overrides: Sequence[str] = (),
    num_jobs: int = 2,
    device: torch.device | str = "cpu",
    watch: Watch | None = None,
) -> list[RunName]:
    """Do all runs of a comparison that are not done yet.

    Args:
        comparison: what is to be done.
        source: its file, from which the processes of the runs read it again.
        folder: where the runs go.
        rows: file of the finished runs' rows; a run whose rows it has is done.
        overrides: what was changed of the file.
        num_jobs: runs at a time.
        device: where the runs train and are asked.
        watch: shows how far each run is; None: nothing does.

    Returns:
        The runs that failed.

    Raises:
        TransformerFamError: as `Schedule.run`.
        KeyboardInterrupt: Ctrl-C; the same call resumes.
    """
    changes = [part for override in overrides for part in ("--set", override)]
    command = [
        sys.executable,
        "-P",  # a torch.py in the folder at hand is not torch
        "-m",
        "transformerfam",
        "compare",
        str(source),
        "--output",
        str(folder),
        *changes,
        "--device",
        str(device),
        "--ends-with-input",
        "--run",
    ]
    return Schedule(comparison, folder, rows, command, num_jobs, watch).run()
