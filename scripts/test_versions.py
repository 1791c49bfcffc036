"""Run the tests with other versions of transformers or torch, each in its own environment over `.venv`.

An environment holds what differs from `.venv` alone and sees the rest through it, so that another transformers costs
seconds. `make test-versions` calls this.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
EDGES = {name: ["-r", f"requirements-{name}.lock"] for name in ("oldest", "newest")}
LATEST = {
    "latest": ["--upgrade", "transformers"],
    "candidate": ["--upgrade", "--pre", "transformers"],
    "latest-torch": ["--upgrade", "torch"],
}
PACKAGES = ("torch", "transformers")

PROMISES = [
    "tests/promises/test_versions.py",
    "tests/promises/test_promises.py",
    "tests/decoder/test_generate.py",
    "tests/fam/test_convert.py",
    "tests/rivals/test_rivals.py::test_logits_and_gradients_equal_the_papers_equations[rmt-29]",
    "tests/rivals/test_rivals.py::test_save_and_load_change_nothing[rmt]",
    "tests/weights/test_peft.py::test_adapter_and_prompt_are_trained_saved_loaded_and_merged[lora]",
    "tests/training/test_blocks.py",
]
"""Conversion, reading, generation, state files, one rival and training steps: what `.ci/run` requires of both edges."""


def make_environment(name: str, requirements: list[str]) -> Path:
    """Install `requirements` into a new environment over the running one and return its Python."""
    folder = ROOT / ".venv-versions" / re.sub(r"[^\w.=-]+", "_", name)
    python = folder / "bin" / "python"
    done = folder / "requirements.json"
    locks = [ROOT / "requirements.lock", *(ROOT / word for word in requirements if word.endswith(".lock"))]
    wanted = json.dumps([requirements, *(lock.read_text() for lock in locks)])
    if done.is_file() and done.read_text() == wanted and name not in LATEST:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    below = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (Path(packages) / "below.pth").write_text(below)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "--quiet", "install"]
    # pip reports that what lies below requires other versions, which is the purpose.
    result = subprocess.run([*pip, *requirements], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{name}: {' '.join(requirements)} cannot be installed:\n{result.stderr}")
    done.write_text(wanted)
    return python


def versions_of(python: Path | str) -> dict[str, str]:
    """Return what an environment has of the packages that are tested."""
    code = "import importlib.metadata as m, json, sys; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    found = subprocess.run([str(python), "-c", code, *PACKAGES], check=True, capture_output=True, text=True)
    return json.loads(found.stdout)


def say_what_is_newer() -> None:
    """Print the releases that the index has beyond the newest tested one; print nothing where it cannot be reached."""
    sys.path.insert(0, str(ROOT / "src"))
    from transformerfam.versions import TESTED, release

    for package, (_, newest) in TESTED.items():
        asked = subprocess.run(
            [sys.executable, "-m", "pip", "index", "versions", package], capture_output=True, text=True
        )
        found = re.match(rf"{package} \(([^)]+)\)", asked.stdout)
        if found and release(found[1]) > release(newest):
            print(f"note: the index has {package} {found[1]}, newer than the newest tested one ({newest})")


def main() -> None:
    """Run the tests in every environment that is named, and exit with 1 where one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "environments",
        nargs="*",
        help="oldest, newest, latest, candidate, latest-torch, and further words as one: torch==2.9.1 peft==0.21.0",
    )
    parser.add_argument("--promises", action="store_true", help="the promises alone, a minute an environment")
    parser.add_argument("--pytest", default="", help="further words for pytest, as --pytest='-x'")
    arguments = parser.parse_args()
    failed = []
    known = EDGES | LATEST
    words = [word for word in arguments.environments if word not in known]
    if unknown := [word for word in words if not re.search(r"[=<>~]", word)]:
        parser.error(f"{unknown[0]} is no environment ({', '.join(known)}) and no requirement such as torch==2.9.1")
    environments = {name: known[name] for name in arguments.environments if name in known}
    environments |= {" ".join(words): words} if words else {}
    for name, requirements in (environments or EDGES).items():
        python = make_environment(name, requirements)
        label = ", ".join(f"{package} {version}" for package, version in versions_of(python).items())
        print(f"{name}: {label}", flush=True)
        start = time.monotonic()
        tests = PROMISES if arguments.promises else []
        command = [str(python), "-m", "pytest", "-n", "auto", "-q", *tests, *shlex.split(arguments.pytest)]
        code = subprocess.run(command, cwd=ROOT).returncode
        print(f"{name}: {label}: {'failed' if code else 'passed'} in {time.monotonic() - start:.0f} s", flush=True)
        failed += [name] * bool(code)
    if arguments.promises:
        say_what_is_newer()
    sys.exit(f"failed with: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
