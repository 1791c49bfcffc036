"""The documents: every snippet compiles, every command parses, every link and anchor leads somewhere; examples run."""

import ast
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from tiny_llama import make_tiny_llama
from tiny_models import make_tokenizer

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    if not path.name.startswith(("compare_", "conversions_"))  # tables that commands write
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    return [code for language, code in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(page: Path) -> list[str]:
    """Return the shell commands of a page, continued lines joined, without comments and prompts of variables."""
    joined = "\n".join(blocks(page, "sh", "bash")).replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines()]


def parse(command: str) -> None:
    """Parse a `fam` command with the real command line; nothing is run."""
    from transformerfam.cli.app import app

    words = shlex.split(re.sub(r"\$\([^)]*\)", "FOLDER", command), comments=True)
    parsed, context = typer.main.get_command(app), None
    while True:
        context = parsed.make_context(words[0], words[1:], parent=context)
        if not hasattr(parsed, "resolve_command"):
            return
        words = [*context._protected_args, *context.args]
        _, parsed, rest = parsed.resolve_command(context, words)
        words = [words[0], *rest]


def slugs(text: str) -> set[str]:
    """Return the anchors of a page, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_of_a_page_compile(page: Path) -> None:
    """Catches a snippet with a slip, and one that imports a name of the package which is gone."""
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code, name_of(page))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformerfam"):
                module = importlib.import_module(node.module)  # type: ignore[arg-type]
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_commands_of_all_pages_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a documented subcommand or option that does not exist, in any page."""
    monkeypatch.chdir(ROOT)
    found = [(page, line) for page in PAGES for line in commands(page) if re.match(r"fam [a-z]", line)]
    assert len(found) > 40
    for page, line in found:
        try:
            parse(line.partition(" && ")[0].partition("; ")[0])
        except Exception as error:
            pytest.fail(f"{name_of(page)}: {line}: {error}")


def test_scripts_that_pages_run_exist() -> None:
    """Catches a command that runs an example, a script or a recipe which was moved."""
    for page in PAGES:
        for line in commands(page):
            for path in re.findall(r"\b(?:examples|scripts|recipes)/[\w/]+\.(?:py|toml)", line):
                assert (ROOT / path).is_file(), f"{name_of(page)}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_of_a_page_lead_somewhere(page: Path) -> None:
    """Catches a link to a section whose title has changed."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", text):
        path = (page.parent / target) if target else page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            assert anchor in slugs(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


def test_every_page_is_in_the_navigation_and_in_the_index() -> None:
    """Catches a page that nobody finds."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in PAGES:
        if page.is_relative_to(ROOT / "docs") and page.name != "README.md":
            name = page.relative_to(ROOT / "docs").as_posix()
            assert f": {name}\n" in navigation, name
            assert f"({name})" in index, name


def test_readme_and_pages_keep_their_lengths() -> None:
    """Catches a README that grows into a manual, and lines that no diff shows well."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    for page in PAGES:
        for line in FENCE.sub("", page.read_text(encoding="utf-8")).splitlines():
            assert len(line) <= 120 or line.lstrip().startswith(("|", "<", "!")), f"{name_of(page)}: {line}"


def test_environment_variables_of_the_package_are_documented() -> None:
    """Catches a variable that changes what a user gets and that no page names."""
    page = (ROOT / "docs" / "reference" / "environment.md").read_text(encoding="utf-8")
    for path in (ROOT / "src").rglob("*.py"):
        code = path.read_text(encoding="utf-8")
        names = re.findall(
            r"environ(?:\.get\(|\[)['\"]([A-Z_]+)|envvar=\"([A-Z_]+)|^CACHE_VARIABLE = \"(\w+)", code, re.M
        )
        for name in ("".join(found) for found in names):
            assert f"`{name}`" in page, name


@pytest.mark.parametrize(
    "name",
    [
        "howto/read_a_book.md",
        pytest.param("howto/fine_tune.md", marks=pytest.mark.slow),
        pytest.param("tutorials/your_model.md", marks=pytest.mark.slow),
    ],
)
def test_snippets_of_a_page_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Catches a snippet whose arguments or attributes are gone: reading a book, fine-tuning, a trained memory."""
    from transformerfam import FamConfig, convert
    from transformerfam.weights.models import save_model

    monkeypatch.chdir(tmp_path)
    make_tiny_llama().save_pretrained("my-llama")
    make_tokenizer().save_pretrained("my-llama")
    config = FamConfig.preset("gated", block_size=8, fam_length=2)
    save_model(convert(make_tiny_llama(), config), make_tokenizer(), "my-memory")
    Path("book.txt").write_text("the letter " * 50)
    names: dict[str, Any] = {"ids": torch.arange(40)[None] % 20}
    for code in blocks(ROOT / "docs" / name, "python"):
        exec(compile(code.replace("runs/smollm2_keys_2", "my-memory"), name, "exec"), names)
    if name == "howto/fine_tune.md":
        assert torch.isfinite(names["loss"])
    else:
        assert names["state"].num_tokens_read > 0
        assert capsys.readouterr().out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    """Catches an example that grows into a program."""
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


def load_example(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr("sys.argv", [name, *arguments])
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_example_reads_and_asks(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Catches an example that no longer recalls the key from the shipped tiny memory."""
    load_example("read_and_ask", monkeypatch, "--sentences", "60", "--key", "40318").main()
    assert capsys.readouterr().out.splitlines()[-2:] == ["40318", "40318"]


def test_example_adds_a_rival(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Catches hooks of a rival that were renamed, and a rival that reads another thing in another split."""
    load_example("add_a_rival", monkeypatch).main()
    assert "the same in any split" in capsys.readouterr().out


@pytest.mark.slow
def test_example_writes_a_task_that_a_recipe_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches files of a task that a training refuses, or that no question file's form has."""
    from transformerfam.tasks.answers import QuestionFile
    from transformerfam.training.recipe.toml import load_recipe
    from transformerfam.training.trainer import Trainer

    monkeypatch.chdir(tmp_path)
    load_example("own_task", monkeypatch, "own_task", "--items", "60").main()
    changes = ["schedule.steps=1", "schedule.batch_size=1", "optimizer.decay_start=0", "optimizer.warmup_steps=0"]
    Trainer(load_recipe(ROOT / "recipes" / "own_task.toml", changes), tmp_path / "run").run()
    assert QuestionFile("own_task/questions.jsonl").items


def test_site_leads_links_to_where_its_pages_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches links that are right in the repository and wrong on the site; `make docs` needs mkdocs, this does not."""
    from scripts import docs_site

    page, card = ROOT / "docs" / "results" / "memories.md", ROOT / "research" / "tiny.md"
    text = "[a](../../research/tiny.md#x) [b](passkey.md) [`recipes/tiny_keys.toml`](../../recipes/tiny_keys.toml)"
    monkeypatch.delenv("DOCS_REPOSITORY", raising=False)
    moved = "[a](../repository/research/tiny.md#x) [b](passkey.md) `recipes/tiny_keys.toml`"
    assert docs_site.relinked(text, page, {card}) == moved
    monkeypatch.setenv("DOCS_REPOSITORY", "https://host/owner/name")
    assert "(https://host/owner/name/blob/main/recipes/tiny_keys.toml)" in docs_site.relinked(text, page, {card})
    assert card in docs_site.pages_outside()


def test_help_of_a_command_is_plain_text() -> None:
    """Catches a page of commands with the codes of colours, and without subcommands or options."""
    from scripts import docs_site
    from transformerfam.cli.app import app

    assert ["evaluate", "passkey"] in docs_site._commands(typer.main.get_command(app), [])
    said = docs_site._help(app, ["evaluate", "passkey"])
    assert "--filler-tokens" in said
    assert "\x1b[" not in said


def test_workflow_builds_the_site() -> None:
    """Catches a site that is never built before it is published."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert {"run": "make docs"} in jobs["docs"]["steps"]
    assert jobs["publish"]["needs"] == "docs"


NOTEBOOK = ROOT / "examples" / "first_memory.ipynb"


def test_notebook_compiles_and_holds_no_output() -> None:
    """Catches a cell with a slip, and a notebook that is committed with the output of somebody's machine."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    for cell in cells:
        ast.parse("".join(cell["source"]))
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_notebook_runs_and_its_memory_recalls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a first tutorial that fails in the middle, or whose memory does not learn."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nbclient.NotebookClient(notebook, timeout=3000, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "627" in said
    assert "8192: 20" in said or "8192: 19" in said
