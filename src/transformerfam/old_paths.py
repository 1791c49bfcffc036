"""The modules' paths before the package had rooms: they work for one more version, and warn with the new one."""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import CodeType, ModuleType
from typing import Any

PACKAGE = "transformerfam"
MOVED = {
    "adapter": "weights.adapter",
    "arguments": "decoder.arguments",
    "attention": "fam.piece",
    "attention_record": "tools.attention_record",
    "cache_argument": "decoder.cache_argument",
    "cache_layer": "fam.layer",
    "cli_compare": "cli.compare",
    "cli_errors": "cli.errors",
    "cli_output": "cli.output",
    "cli_plan": "cli.plan",
    "cli_report": "cli.report",
    "compiled": "fam.compiled",
    "convert": "fam.convert",
    "costs": "tools.costs",
    "demo": "cli.demo",
    "fake_model": "tools.fake_model",
    "families": "decoder.families",
    "flash": "decoder.flash",
    "forward": "decoder.pieces",
    "generation": "decoder.generation",
    "half_precision": "decoder.half_precision",
    "harness": "tools.lm_eval",
    "hidden_gradients": "decoder.hidden_gradients",
    "identity": "decoder.identity",
    "kernels": "decoder.kernels",
    "layouts": "decoder.layouts",
    "loading": "weights.pretrained",
    "masks": "fam.masks",
    "memory": "fam.memory",
    "models": "weights.models",
    "novels": "tasks.novels",
    "peft_adapters": "weights.peft_adapters",
    "plan": "tools.plan",
    "positions": "decoder.positions",
    "progress": "cli.progress",
    "reading": "fam.start",
    "reading_state": "decoder.state",
    "reference_layer": "reference.layer",
    "reports.attention": "tools.attention_pictures",
    "row_lora": "fam.row_lora",
    "seams": "fam.checks",
    "smollm2": "weights.smollm2",
    "state": "fam.state",
    "steps": "decoder.step",
    "tasks.telling": "reports.telling",
    "text_models": "decoder.text_models",
    "training.auxiliary": "training.step.auxiliary",
    "training.blocks": "training.step.blocks",
    "training.instructions": "training.data.instructions",
    "training.packed": "training.step.packed",
    "training.ranges": "tasks.ranges",
    "training.recipe_file": "training.recipe.toml",
    "training.scores": "training.step.scores",
    "training.sections": "training.recipe.sections",
    "training.sequences": "training.data.sequences",
    "training.sources": "training.data.sources",
    "training.stored_filler": "training.step.stored_filler",
    "training.teacher": "training.step.teacher",
    "training.told_rows": "tasks.writing",
    "training.worded_rows": "tasks.worded_keys_training",
    "unlisted": "fam.unlisted",
}
"""Old path to new path, within the package. Names that went elsewhere are not followed."""


def install() -> None:
    """Let the old paths be imported; twice is once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
    sys.modules[PACKAGE].__class__ = _Package


def names_of(old: str, new: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package whose path was a module's: it looks names up in the module `new`.

    Args:
        old: path of the package.
        new: path of the module that was there, with what it has now.
    """

    def look_up(name: str) -> Any:
        is_module = name.startswith("__") or find_spec(f"{old}.{name}") is not None  # which the import then loads
        module = None if is_module else importlib.import_module(new)
        if not hasattr(module, name):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        _warn(old, new)
        return getattr(module, name)

    return look_up


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is {new} now; the old path is removed in the next version", DeprecationWarning, stacklevel=3)


class _Package(ModuleType):
    """The package, in which `convert` is the function, whatever module of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "convert" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


class _Finder(MetaPathFinder):
    """Finds a module by its old path."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of an old path, None for any other."""
        package, _, old = fullname.partition(".")
        if package != PACKAGE or old not in MOVED:
            return None
        return ModuleSpec(fullname, _Loader(f"{PACKAGE}.{MOVED[old]}"))


class _Loader(Loader):
    """Gives the module at its new path, the same object."""

    def __init__(self, new: str) -> None:
        self.new = new

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Import the module at its new path."""
        _warn(spec.name, self.new)
        module = importlib.import_module(self.new)
        self.own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back; it has run before."""
        module.__spec__ = self.own_spec

    def get_code(self, fullname: str) -> CodeType | None:
        """Return the module's code, for `python -m`."""
        _warn(fullname, self.new)
        spec = find_spec(self.new)
        code: CodeType | None = spec.loader.get_code(self.new)  # type: ignore[union-attr]
        return code
