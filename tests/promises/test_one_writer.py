"""One process writes a run or a file of rows, a crash lets go of it, and readers beside a writer see one whole file."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from command_line import run
from filelock import FileLock
from tiny_llama import make_tiny_llama
from training_recipes import SMALLEST_TRAINING as RECIPE
from training_recipes import small_recipe

from transformerfam import FamConfig, convert, processes
from transformerfam.errors import CorruptFileError, TransformerFamError
from transformerfam.files import load_tensors, locks, save_tensors
from transformerfam.files import tensors as tensor_files
from transformerfam.reports.rows import RowFile, read_rows
from transformerfam.training.trainer import Trainer
from transformerfam.versions import require_peft
from transformerfam.weights import adapter
from transformerfam.weights.adapter import FamAdapter, inject_lora

PROCESSES = Path(processes.__file__)
HOLDER = """
import sys, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held_elsewhere(path):
    """Let another process hold a lock, and yield the process."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process


def test_second_training_in_a_folder_is_refused_until_the_first_is_dead(tmp_path, monkeypatch):
    """Would catch two runs that write one log and one checkpoint, and a lock that a crash leaves."""
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.0)
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE)
    output = tmp_path / "run"
    train = ("train", recipe, "--output", output)
    run(*train)
    with held_elsewhere(output / "run.lock") as process:
        for more in ("--resume", "--overwrite"):
            assert f"the run in {output} is written by another process" in run(*train, more, status=2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        run(*train, "--resume")


def test_trainer_lets_go_of_its_folder_at_its_end(tmp_path):
    """Would catch a notebook that can train once."""
    Trainer(small_recipe(schedule={"steps": 1}), tmp_path).run()
    with FileLock(tmp_path / "run.lock").acquire(timeout=0):
        pass


def test_second_writer_of_rows_is_refused(tmp_path, monkeypatch):
    """Would catch every question evaluated twice and counted twice."""
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.0)
    path = tmp_path / "rows.jsonl"
    with RowFile(path) as rows:
        with pytest.raises(TransformerFamError, match="rows.jsonl is written by another process; wait until it ends"):
            RowFile(path)
        rows.append({"task": "a"})
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with RowFile(path) as others:  # of the same launch
            others.append({"task": "b"})
    with RowFile(path) as rows:
        assert [row["task"] for row in rows.rows] == ["a", "b"]


def test_rows_are_read_beside_their_writer(tmp_path):
    """Would catch a report that fails on the half line of a run that is still evaluating."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"task": "a"}\n{"task": "b", "ke')
    assert read_rows([path]) == [{"task": "a"}]
    path.write_text('{"task": "a"}\nnotes')
    with pytest.raises(CorruptFileError, match="line 2 of .* is not a result row"):
        read_rows([path])


def test_tensors_are_read_beside_their_writer(tmp_path, monkeypatch):
    """Would catch a header of one file with the tensors of the next: "damaged", in 9 of 560 loads."""
    path = tmp_path / "x.safetensors"

    def save(number):
        save_tensors(path, {"a": torch.full((number,), number)}, {"kind": "t", "format_version": 1, "n": number})

    plain = tensor_files.load

    def slow(content):
        save(3)
        return plain(content)

    save(2)
    monkeypatch.setattr(tensor_files, "load", slow)
    tensors, metadata = load_tensors(path, "t", 1)
    assert (metadata["n"], tensors["a"].tolist()) == (2, [2, 2])


def test_adapter_is_read_beside_its_writer(tmp_path, monkeypatch):
    """Would catch LoRA of one save with the memory of another taken for damage."""
    for number in (1, 2):
        model = convert(make_tiny_llama(), FamConfig(block_size=16, fam_length=2))
        inject_lora(model, require_peft().LoraConfig(r=number, target_modules=["q_proj"]))
        FamAdapter.from_model(model).save_pretrained(tmp_path / str(number))
    memory, lora = (tmp_path / "1" / name for name in ("fam.safetensors", "adapter_model.safetensors"))
    lora.write_bytes((tmp_path / "2" / lora.name).read_bytes())
    writer = threading.Timer(0.1, lambda: os.replace(tmp_path / "2" / memory.name, memory))
    writer.start()
    assert FamAdapter.from_pretrained(tmp_path / "1").lora_config["r"] == 2
    writer.join()
    lora.write_bytes(lora.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(adapter, "SETTLE_SECONDS", 0.0)
    with pytest.raises(CorruptFileError, match="is damaged: its checksum does not match"):
        FamAdapter.from_pretrained(tmp_path / "1")


def test_child_ends_with_its_parent():
    """Would catch runs of a comparison that train on after their scheduler was killed."""
    code = f"import runpy, signal; runpy.run_path({str(PROCESSES)!r})['end_with_input'](); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        process.stdin.write(b"x")
        process.stdin.flush()
        assert process.poll() is None
        process.stdin.close()
        assert process.wait() == -signal.SIGTERM
