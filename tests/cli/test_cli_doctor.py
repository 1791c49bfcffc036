"""`fam doctor`: what works, what does not, and what to do, whatever is broken."""

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from transformerfam.cli.app import app
from transformerfam.tools import doctor
from transformerfam.tools.doctor import Finding, check_folder, examine


def findings(check):
    return {finding.name: finding for finding in examine([check])}


def test_sound_installation_passes_and_its_seams_are_tried():
    """Catches a self-test that does not compare, and a check that fails on a machine where all works."""
    result = CliRunner().invoke(app, ["doctor", "--json"])
    facts = json.loads(result.stdout)
    by_name = {check["name"]: check for check in facts["checks"]}
    assert (result.exit_code, facts["is_sound"]) == (0, True), facts
    assert {"python", "torch", "transformers", "threads", "attention", "compiler", "seams", "recall"} <= set(by_name)
    assert "against the reference" in by_name["seams"]["found"]
    assert by_name["recall"]["found"].startswith("tiny recalls 2 of 2 keys")


def test_exit_status_and_lines_say_what_failed(monkeypatch):
    """Catches a failure with status 0, markup that swallows a path, and a remedy that is not shown."""
    found = [Finding("a", "ok", "[1] fine"), Finding("b", "failed", "gone", "install it"), Finding("c", "warning", "x")]
    monkeypatch.setattr("transformerfam.cli.doctor.examine", lambda: iter(found))
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "40"})
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        "ok      a: [1] fine",
        "failed  b: gone",
        "        install it",
        "warning c: x",
    ]
    monkeypatch.setattr("transformerfam.cli.doctor.examine", lambda: iter(found[2:]))
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0


@pytest.mark.parametrize(
    ("version", "status", "words"),
    [
        (None, "failed", "pip install 'transformers>=5"),
        ("4.57.1", "failed", "required is at least 5"),
        ("99.1", "warning", "newer than any that was tested"),
    ],
)
def test_versions_that_are_not_tested_are_named(monkeypatch, version, status, words):
    """Catches an old transformers that is called fine, and a newer one that is called broken."""
    monkeypatch.setattr(doctor, "installed_version", lambda name: version)
    finding = findings(doctor.check_versions)["transformers"]
    assert finding.status == status
    assert words in f"{finding.found}; {finding.remedy}"


def test_extras_that_are_not_installed_are_no_fault(monkeypatch):
    """Catches a warning for what was left out on purpose, and an extra without its command."""
    monkeypatch.setattr(doctor, "installed_version", lambda name: "0.1" if name == "peft" else None)
    found = findings(doctor.check_extras)
    assert found["extra plots"] == Finding(
        "extra plots", "ok", "not installed: matplotlib", "where it is needed: pip install 'transformerfam[plots]'"
    )
    assert found["extra train"].status == "warning"
    assert "required is peft" in found["extra train"].found
    assert "extra dev" not in found


def test_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    """Catches a read-only cache that is found out after an hour of download, and one that is made by looking."""
    assert check_folder("cache", tmp_path / "not" / "yet", "HERE").status == "ok"
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").write_text("")
    finding = check_folder("cache", tmp_path / "file" / "cache", "HERE")
    assert finding.status == "warning"
    assert "set HERE to a folder that can be written" in finding.remedy

    def refuse(**options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    finding = check_folder("cache", tmp_path, "HERE")
    assert finding.found == f"{tmp_path} cannot be written (Read-only file system)"


def test_full_disk_is_a_warning(tmp_path, monkeypatch):
    """Catches a disk that has no room for the weights."""
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=5))
    assert check_folder("cache", tmp_path, "HERE").status == "warning"


def test_more_threads_than_processors_is_a_warning(monkeypatch):
    """Catches the slowest mistake on a shared machine."""
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: set(), raising=False)
    finding = doctor.check_threads()
    assert finding.status == "warning"
    assert "OMP_NUM_THREADS=0" in finding.remedy


def test_no_compiler_is_a_warning(monkeypatch):
    """Catches a compilation that fails in the middle of a reading."""
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert findings(doctor.check_backends)["compiler"].status == "warning"


def test_device_that_cannot_be_used_is_a_warning(monkeypatch):
    """Catches a GPU that torch sees and whose driver fails, which would end the doctor."""
    import torch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "zeros", lambda *a, **b: (_ for _ in ()).throw(RuntimeError("no driver\nat all")))
    finding = findings(doctor.check_devices)["GPU cuda:0"]
    assert (finding.status, finding.found) == ("warning", "cannot be used (no driver)")


def test_check_that_raises_has_failed_and_the_others_run(monkeypatch):
    """Catches a doctor that dies of what it is to find, and seams that differ and are called fine."""

    def check_one():
        raise ImportError("no module\nnamed torch")

    found = list(examine([check_one, lambda: Finding("two", "ok", "there")]))
    assert [(finding.name, finding.status) for finding in found] == [("one", "failed"), ("two", "ok")]
    assert found[0].found == "ImportError: no module named torch"
    monkeypatch.setattr(doctor, "SELF_TEST_TOLERANCE", 0.0)
    assert doctor.check_seams().status == "failed"
