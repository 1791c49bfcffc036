"""The subcommand `fam doctor`."""

import dataclasses
import importlib.metadata

import typer
from rich.console import Console
from rich.markup import escape

from transformerfam.cli.options import JsonOption
from transformerfam.cli.output import print_json
from transformerfam.tools.doctor import Finding, examine

COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


def doctor_command(as_json: JsonOption = False) -> None:
    """Say what of this installation works, what does not, and what to do; in ten seconds.

    The exit status is 1 where something failed without which nothing works.
    """
    findings = []
    console = Console(soft_wrap=True, highlight=False)
    for finding in examine():
        findings.append(finding)
        if not as_json:
            _show(console, finding)
    is_sound = all(finding.status != "failed" for finding in findings)
    if as_json:
        facts = {"version": importlib.metadata.version("transformerfam"), "is_sound": is_sound}
        print_json({**facts, "checks": [dataclasses.asdict(finding) for finding in findings]})
    if not is_sound:
        raise typer.Exit(1)


def _show(console: Console, finding: Finding) -> None:
    colour = COLOURS[finding.status]
    console.print(f"[{colour}]{finding.status:7}[/{colour}] {escape(finding.name)}: {escape(finding.found)}")
    if finding.remedy:
        console.print(f"        {escape(finding.remedy)}")
