"""Commands of this package in several processes, or in one of its own, for the tests.

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
CONTEXT.set_forkserver_preload(["accelerate", "peft", "transformerfam.cli.app", __name__])
SECONDS = 280


class Done(NamedTuple):
    """How processes ended: the first exit status that is not 0, and what all of them wrote."""

    returncode: int
    stdout: str
    stderr: str


def run_in_processes(folder: Path, arguments: list[str], number: int = 1) -> Done:
    """Run a command of this package on the CPU, one thread a process, as `accelerate launch` would run it.

    Args:
        folder: gets the output of every process.
        arguments: behind `fam`.
        number: of processes; with several each knows the others.
    """
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    if number > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number)}
    processes = []
    for rank in range(number):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if number > 1 else {}
        process: Any = CONTEXT.Process(target=_run, args=(folder / f"said-{rank}", arguments, environment | own))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(SECONDS)
    statuses = [124 if process.exitcode is None else process.exitcode for process in processes]
    for process in processes:
        process.kill()
    said = [
        "".join((folder / f"said-{rank}.{stream}").read_text() for rank in range(number)) for stream in ("out", "err")
    ]
    return Done(next((status for status in statuses if status), 0), *said)


def _run(said: Path, arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    for number, stream in ((1, "out"), (2, "err")):
        file = os.open(f"{said}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    torch.set_num_threads(1)
    from transformerfam.cli.app import app

    sys.argv = ["fam", *arguments]
    app(arguments)
