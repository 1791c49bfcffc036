"""Commands of this package in several processes, or in a separate one, for the tests.

They are forked from one process that has imported everything, where `accelerate launch` and a new interpreter import it
in each, which takes seconds: what is tested here is what the processes do, not how they are started.
"""

import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

CONTEXT = multiprocessing.get_context("forkserver")
COMMANDS = [f"transformerfam.cli.{name}" for name in ("app", "compare", "evaluate_passkey", "read", "train")]
CONTEXT.set_forkserver_preload(["accelerate", "peft", *COMMANDS, __name__])
SECONDS = 280


class Forked:
    """What a comparison starts its runs by, in the place of `subprocess.Popen`: forked, and with little to read.

    Args:
        command: `python -m transformerfam ...`.
        stdin: a pipe, which `communicate` closes.
        stdout: a file, for all that is written.
        stderr: the same.
    """

    def __init__(self, command: list[str], stdin: int, stdout: Any, stderr: Any) -> None:
        arguments = command[command.index("transformerfam") + 1 :]
        read, self._write = CONTEXT.Pipe(duplex=False)
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        paths = (stdout.name, stderr.name)
        self._process: Any = CONTEXT.Process(target=_run, args=(paths, arguments, environment, read, os.getcwd()))
        self._process.start()
        read.close()

    def wait(self) -> int:
        """Wait for its end, and return its exit status."""
        self._process.join(SECONDS)
        assert self._process.exitcode is not None
        return int(self._process.exitcode)

    def communicate(self) -> None:
        """Close what it reads from."""
        self._write.close()


class Done(NamedTuple):
    """How processes ended: the first exit status that is not 0, and what all of them wrote."""

    returncode: int
    stdout: str
    stderr: str


def run_in_processes(folder: Path, arguments: list[str], number: int = 1) -> Done:
    """Run a command of this package on the CPU, one thread a process, as `accelerate launch` would run it.

    Args:
        folder: gets the output of every process.
        arguments: after `fam`.
        number: of processes; with several each knows the others.
    """
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    if number > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number)}
    said = [(folder / f"said-{rank}.out", folder / f"said-{rank}.err") for rank in range(number)]
    processes = []
    for rank, paths in enumerate(said):
        for path in paths:
            path.unlink(missing_ok=True)
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if number > 1 else {}
        process: Any = CONTEXT.Process(target=_run, args=(paths, arguments, environment | own))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(SECONDS)
    statuses = [124 if process.exitcode is None else process.exitcode for process in processes]
    for process in processes:
        process.kill()
    written = ("".join(path.read_text() for path in paths) for paths in zip(*said, strict=True))
    return Done(next((status for status in statuses if status), 0), *written)


def start_in_session(folder: Path, arguments: list[str]) -> Any:
    """Start a command of this package in a session: what it starts gets the signals of its group too.

    Returns:
        the process; what it writes is in `said.out` and `said.err` of `folder`.
    """
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    paths = (folder / "said.out", folder / "said.err")
    process: Any = CONTEXT.Process(target=_run_in_session, args=(paths, arguments, environment))
    process.start()
    return process


def _run_in_session(*arguments: Any) -> None:
    os.setsid()
    _run(*arguments)


def _run(
    paths: tuple[str | Path, str | Path],
    arguments: list[str],
    environment: dict[str, str],
    stdin: Any = None,
    folder: str = ".",
) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in enumerate(paths, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    torch.set_num_threads(1)
    from transformerfam.cli.app import app
    from transformerfam.comparison import report, run

    if stdin is not None:
        os.dup2(stdin.fileno(), 0)
        sys.stdin = os.fdopen(0)
        report.BYTES_LENGTHS = run.BYTES_LENGTHS = (8, 24)
    sys.argv = ["fam", *arguments]
    app(arguments)
