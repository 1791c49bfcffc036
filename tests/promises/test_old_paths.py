"""Paths of modules from before the package had rooms."""

import importlib
import subprocess
import sys

import pytest

import transformerfam
from transformerfam.old_paths import MOVED, PACKAGE

NOW_PACKAGES = {
    "reference": "run_reference",
    "cli": "main",
    "training.recipe": "Recipe",
    "training.step": "StepOutput",
}
"""Paths of modules that are packages now, and a name that was in each."""


@pytest.mark.parametrize("old", MOVED)
def test_old_path_gives_the_module_and_warns(old: str) -> None:
    """Catches a second copy of a module, whose classes are others, and a warning that does not name the new path."""
    new = f"{PACKAGE}.{MOVED[old]}"
    sys.modules.pop(f"{PACKAGE}.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"{new} now") as caught:
        module = importlib.import_module(f"{PACKAGE}.{old}")
    assert caught[0].filename != importlib.import_module(f"{PACKAGE}.old_paths").__file__
    assert module is importlib.import_module(new)
    assert module.__spec__ is not None
    assert module.__spec__.name == module.__name__ == new


@pytest.mark.parametrize("old", NOW_PACKAGES)
def test_package_in_the_place_of_a_module_gives_its_names(old: str) -> None:
    """Catches a package that has lost what was in the module of its path, or gives it without a warning."""
    name = NOW_PACKAGES[old]
    with pytest.warns(DeprecationWarning, match=f"{PACKAGE}.{old} is"):
        assert getattr(importlib.import_module(f"{PACKAGE}.{old}"), name) is not None
    with pytest.raises(AttributeError, match="no attribute 'neverthere'"):
        _ = importlib.import_module(f"{PACKAGE}.{old}").neverthere


def test_convert_is_a_function_and_was_a_module_and_new_paths_do_not_warn() -> None:
    """Catches an import of the old module that hides the function, and a module of ours that imports by an old path.

    One interpreter does both: nothing of ours is imported in it before.
    """
    old = "import transformerfam.convert; from transformerfam.convert import personal_memory, convert; "
    old += "import transformerfam; assert transformerfam.convert is convert; "
    old += "from transformerfam import convert as again; assert again is convert\n"
    new = (
        "import pkgutil, importlib, warnings\nEXTRAS = ('lm_eval', 'serving.ray')  # which need what may not be there\n"
    )
    new += "warnings.filterwarnings('error', message='transformerfam', category=DeprecationWarning)\n"
    new += "for m in pkgutil.walk_packages(transformerfam.__path__, 'transformerfam.'):\n"
    new += "    if not m.name.endswith('__main__') and not any(name in m.name for name in EXTRAS):\n"
    new += "        importlib.import_module(m.name)\n"
    subprocess.run([sys.executable, "-c", old + new], check=True)
    assert callable(transformerfam.convert)
