"""The README's snippets and commands, and what a release must hold."""

import importlib.metadata
import re
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from tiny_llama import make_tiny_llama
from tiny_models import make_tokenizer

import transformerfam
from scripts.package import build, installed_files, tracked
from transformerfam import FamConfig, convert
from transformerfam.tasks.novels import load_novel
from transformerfam.weights.models import save_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md")}


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[str]:
    """Return the documented commands of a program, without comments."""
    lines = [line for text in DOCUMENTS.values() for block in code_blocks(text, "sh") for line in block.splitlines()]
    return [line.split("#")[0].strip() for line in lines if line.startswith(f"{program} ")]


def test_readme_python_blocks_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a snippet that names a function, argument or attribute which is gone.

    Stands in for the user's files: a tiny random model as `my-llama`, also in the place of the named ones.
    """
    monkeypatch.chdir(tmp_path)
    make_tiny_llama().save_pretrained("my-llama")
    make_tokenizer().save_pretrained("my-llama")
    save_model(
        convert(make_tiny_llama(), FamConfig(fam_key_bias=0.0, block_size=8, fam_length=2)), make_tokenizer(), "named"
    )
    Path("book.txt").write_text(load_novel("persuasion")[:20_000])
    blocks = code_blocks(README, "python")
    assert len(blocks) >= 3
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block.replace('"smollm2"', '"named"'), "README.md", "exec"), namespace)
    assert Path("book.fam.safetensors").stat().st_size > 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", commands("make"))
def test_documented_make_target_exists(command: str) -> None:
    """Catches a documented target that the Makefile lacks."""
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").iterdir()), ids=lambda path: path.name)
def test_make_targets_of_workflows_exist(path: Path) -> None:
    """Catches a job that runs a target which was renamed."""
    makefile = (ROOT / "Makefile").read_text()
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    ran = [step["run"] for job in jobs for step in job["steps"] if step.get("run", "").startswith("make ")]
    assert ran
    for command in ran:
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command


def test_hooks_run_what_make_check_runs() -> None:
    """Catches a check that the hooks of git leave out."""
    (check,) = re.findall(r"^check: (.*?) +##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == [f"make {target}" for target in check.split()]


def test_file_tree_exists() -> None:
    """Catches a file tree that names what was moved or removed."""
    folder = ROOT
    (tree,) = code_blocks(DOCUMENTS["CONTRIBUTING.md"], "text")
    for line in tree.splitlines():
        names = [word for word in line[:22].split() if word.endswith((".py", "/"))]
        for name in names:
            assert (folder / name if line.startswith(" ") else ROOT / name).exists(), name
            folder = ROOT / name if name.endswith("/") and not line.startswith(" ") else folder


@pytest.mark.parametrize("name", DOCUMENTS)
def test_document_links_lead_somewhere(name: str) -> None:
    """Catches links to files that were moved."""
    for target in re.findall(r"\]\(([^)#:]+)\)", DOCUMENTS[name]):
        assert (ROOT / target).exists(), target


def test_lock_file_fits_the_package_requirements() -> None:
    """Catches a lock file that pins what pyproject.toml does not accept, or misses a package."""
    from packaging.requirements import Requirement

    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for name, texts in project["optional-dependencies"].items() if name != "ray" for text in texts]
    for text in project["dependencies"] + extras:
        requirement = Requirement(text)
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(pins[requirement.name]), text
    if not Path(sys.prefix, "requirements.json").is_file():  # scripts/test_versions.py installed another on purpose
        assert torch.__version__.split("+")[0] == pins["torch"]


def test_version_is_that_of_the_distribution() -> None:
    """Catches rows that carry another version than the installed package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert importlib.metadata.version("transformerfam") == project["version"]


def test_public_names_are_documented_in_the_readme() -> None:
    """Catches a public name that a user cannot learn of."""
    for name in transformerfam.__all__:
        assert name in README


def test_wheel_holds_what_is_tracked_below_src(tmp_path: Path) -> None:
    """Catches data that is not shipped, and tests or caches that are; the sdist, of which it is built, has no tests."""
    wheel, sdist = build(tmp_path)
    assert installed_files(wheel) == [name.removeprefix("src/") for name in tracked("src")]
    assert "transformerfam/py.typed" in installed_files(wheel)
    with tarfile.open(sdist) as archive:
        assert not any("/tests/" in name for name in archive.getnames())
