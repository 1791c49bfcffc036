"""Help, versions and completion: at once, since no command's module is imported for them."""

import inspect
import io
import subprocess
import sys

import pytest
import typer
from command_line import run
from typer.testing import CliRunner

import fam_command
from transformerfam.cli import options
from transformerfam.cli.app import app, command_of, function_of
from transformerfam.cli.commands import COMMANDS, Group, all_commands
from transformerfam.errors import UnsupportedVersionError
from transformerfam.tasks.controls import CONTROLS
from transformerfam.versions import UNCHECKED, check_versions

SILENT = {
    ("chat",): "a conversation",
    ("serve",): "it runs until it is stopped, and logs JSON lines",
}
"""Commands without --json, and why."""


@pytest.mark.parametrize("name", all_commands(), ids=" ".join)
def test_list_of_commands_agrees_with_the_commands(name):
    """Catches a command that is listed and not there, and a line of help that is another than its own."""
    entry = all_commands()[name]
    function = function_of(entry)
    assert inspect.getdoc(function).splitlines()[0] == entry.help
    names = [option for param in command_of(name[-1], function).params for option in param.opts]
    assert len(names) == len(set(names))  # -q and -v are added to each
    assert {"--quiet", "--verbose"} <= set(names)
    assert ("--json" in names) is (name not in SILENT)


def test_order_of_help_is_that_of_the_list():
    """Catches groups that come after all single commands, and a default that is no command."""
    group = typer.main.get_command(app)
    assert group.list_commands(None) == list(COMMANDS)
    for entry in COMMANDS.values():
        assert not isinstance(entry, Group) or entry.default in (None, *entry.commands)


def test_controls_of_help_are_those_there_are():
    """Catches a control that `--system` does not name."""
    assert tuple(f"fam{ending}" for ending in CONTROLS) == options.CONTROLS


def test_short_help_and_version():
    """Catches -h that is no option, and a version that is not shown."""
    assert run("-h") == run("--help")
    assert "Print tables of result rows" in run("report", "-h")
    assert "--skip-tokens" in run("read", "-h")
    said = run("--version")
    assert said.startswith("transformerfam 0.")
    assert "torch" in said
    assert "transformers" in said


def test_help_version_and_completion_import_no_command():
    """Catches seconds of imports in front of help, of the version, and of every press of the tabulator."""
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom transformerfam.cli.app import app\n"
        "for words in (['-h'], ['--version'], ['evaluate', '--help'], ['report', '-h']):\n"
        "    result = CliRunner().invoke(app, words)\n    assert result.exit_code == 0, result.output\n"
        "environment = {'_FAM_COMPLETE': 'complete_bash', 'COMP_WORDS': 'fam evaluate a', 'COMP_CWORD': '2'}\n"
        "print(CliRunner().invoke(app, [], env=environment, prog_name='fam').output)\n"
        "from transformerfam.tools import doctor\n"
        "from transformerfam.cli import doctor\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["answers"]


def test_versions_that_are_too_old_end_in_one_line_and_the_doctor_runs(monkeypatch, capsys):
    """Catches a traceback in front of every command, and a doctor that cannot be asked when it is needed."""
    monkeypatch.setattr("transformerfam.versions.installed_versions", lambda: {"transformers": "4.0"})
    monkeypatch.delenv(UNCHECKED, raising=False)
    with pytest.raises(UnsupportedVersionError, match="transformers is 4.0, required is at least"):
        check_versions()
    monkeypatch.setenv(UNCHECKED, "1")
    check_versions()
    assert fam_command.UNCHECKED == UNCHECKED
    monkeypatch.delenv(UNCHECKED)
    run_by = []
    names = (UNCHECKED, fam_command.NO_BARS)
    monkeypatch.setattr(
        "transformerfam.cli.app.app", lambda: run_by.append([fam_command.os.environ.get(name) for name in names])
    )
    for words in (["fam", "-q", "doctor"], ["fam", "read", "doctor"]):
        monkeypatch.setattr(fam_command.os, "environ", {})
        monkeypatch.setattr(sys, "argv", words)
        fam_command.main()
    assert run_by == [["1", "1"], [None, "1"]]
    monkeypatch.delattr("transformerfam.cli.app.app")

    def refuse(name):
        raise UnsupportedVersionError("transformers is 4.0")

    monkeypatch.setattr("transformerfam.cli.app.__getattr__", refuse, raising=False)
    with pytest.raises(SystemExit) as caught:
        fam_command.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: transformers is 4.0; fam doctor says what works\n"


def test_what_the_terminal_cannot_show_is_an_escape(monkeypatch):
    """Catches an answer that is lost on a terminal of another encoding."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "argv", ["fam"])
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr("transformerfam.cli.app.app", lambda: sys.stdout.write("caf\u00e9 \U0001f600"))
    fam_command.main()
    stream.flush()
    assert stream.buffer.getvalue() == b"caf\\xe9 \\U0001f600"


def test_help_fits_narrow_terminals_and_none_with_colour(monkeypatch):
    """Catches help that is wider than the terminal, and escape codes where there is no colour."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERMINAL_WIDTH", "40")
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "40"}).output
    assert "\x1b[3" not in shown
    assert "doctor" in shown
