"""Build the wheel and the sdist, and use the wheel as someone who installs it does. `make package` calls this.

Both are built from a copy of what git tracks, the wheel from the unpacked sdist: neither what lies about in the working
tree nor an earlier build gets into them.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TYPED = """\
from transformerfam import FamConfig, FamState
reveal_type(FamConfig().block_size)
def size(state: FamState) -> int: return state.num_bytes
FamConfig().block_sise
"""
REVEALED = ('Revealed type is "int"', 'Revealed type is "builtins.int"')
"""What mypy says of the field, by version."""
MISSPELT = 'has no attribute "block_sise"'


def main() -> None:
    """Build, install, and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder for wheel and sdist, emptied first")
    parser.add_argument(
        "--alone", action="store_true", help="install the wheel with its dependencies, where .venv is not seen"
    )
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output, ignore_errors=True)
    wheel, sdist = build(arguments.output)
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder, "environment")
        install(wheel, environment, alone=arguments.alone)
        elsewhere = Path(folder, "elsewhere")
        elsewhere.mkdir()
        require_types(environment, elsewhere)
        require_demo(environment, elsewhere)
    for path in (wheel, sdist):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def tracked(folder: str = ".") -> list[str]:
    """Return the files that git tracks below a folder of the repository, and that are there."""
    listed = subprocess.run(["git", "ls-files", "-z", folder], cwd=ROOT, check=True, capture_output=True, text=True)
    return sorted(name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())


def build(output: Path) -> tuple[Path, Path]:
    """Build both.

    Args:
        output: folder for them.

    Returns:
        The paths of the wheel and the sdist.
    """
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in tracked():
            target = Path(folder, "tree", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
        sdist = _run_backend("sdist", Path(folder, "tree"), output)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        (unpacked,) = Path(folder).glob("transformerfam-*")
        wheel = _run_backend("wheel", unpacked, output)
    return wheel, sdist


def _run_backend(kind: str, tree: Path, output: Path) -> Path:
    """Call the hook of setuptools that a front end calls, which works in the current folder."""
    code = f"import sys; from setuptools.build_meta import build_{kind} as build; print(build(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, output], cwd=tree, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the {kind} cannot be built:\n{done.stderr}")
    return output / done.stdout.splitlines()[-1]


def installed_files(wheel: Path) -> list[str]:
    """Return the files of a wheel that are installed as packages."""
    return sorted(name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name)


def install(wheel: Path, environment: Path, alone: bool) -> None:
    """Make an environment and install the wheel into it.

    Args:
        wheel: what is installed.
        environment: folder of the new environment.
        alone: install what the wheel depends on, too, in the versions of the lock file; otherwise packages of the
            running environment are seen, without the repository, which is installed there.
    """
    venv.create(environment, with_pip=alone)
    pip = [_python(environment), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    if alone:
        pip += ["--constraint", str(ROOT / "requirements.lock")]
    else:
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
        # A path alone: the .pth files there, one of which leads to the repository, are not read.
        (packages / "below.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        pip += ["--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([*pip, wheel], check=True)


def require_types(environment: Path, folder: Path) -> None:
    """End with an error unless mypy knows the installed package's types."""
    (folder / "snippet.py").write_text(TYPED)
    (folder / "mypy.ini").write_text("[mypy]\n[mypy-torch.*,transformers.*]\nfollow_imports = skip\n")
    mypy = [sys.executable, "-m", "mypy", "--python-executable", _python(environment), "snippet.py"]
    said = subprocess.run(mypy, cwd=folder, env=_outside(), capture_output=True, text=True).stdout
    if not any(text in said for text in REVEALED) or MISSPELT not in said or "found 1 error" not in said.lower():
        sys.exit(f"mypy does not see the types of the installed package:\n{said}")
    print("mypy sees the types of the installed package")


def require_demo(environment: Path, folder: Path) -> None:
    """End with an error unless `fam demo --model tiny` of the installed package recalls the key."""
    where = "import fam_command, transformerfam; print(fam_command.__file__, transformerfam.__file__, sep='\\n')"
    found = subprocess.run(
        [_python(environment), "-c", where], cwd=folder, env=_outside(), check=True, capture_output=True, text=True
    ).stdout.split("\n")
    if not all(Path(path).is_relative_to(environment) for path in found if path):
        sys.exit(f"imported is {' '.join(found)}, and not what was installed into {environment}")
    fam = Path(sysconfig.get_path("scripts", vars={"base": str(environment)}), "fam")
    subprocess.run([fam, "demo", "--model", "tiny", "--seed", "0"], cwd=folder, env=_outside(), check=True)


def _python(environment: Path) -> str:
    return str(Path(sysconfig.get_path("scripts", vars={"base": str(environment)}), "python"))


def _outside() -> dict[str, str]:
    """Return the environment's variables without those that lead back to the repository."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}


if __name__ == "__main__":
    main()
