"""What commands do around a model: load it, name it in rows, and print what warnings say."""

import contextlib
import json
import warnings
from collections.abc import Iterator
from typing import Any, get_args

import torch

from transformerfam.cli.output import say
from transformerfam.config import FAM_DTYPES, FamConfig
from transformerfam.decoder.memory import hold_weights_in
from transformerfam.errors import TransformerFamError
from transformerfam.processes import own_device
from transformerfam.rivals import RivalConfig, attach
from transformerfam.tasks.answers_evaluation import FULL_CONTEXT
from transformerfam.tasks.controls import control_of
from transformerfam.training.recipe.toml import parse_overrides
from transformerfam.weights.memories import System
from transformerfam.weights.models import GATED, find_device, load_base, load_model, name_in_rows

READERS = get_args(System)
"""Systems that `fam read` reads with."""
FULL_BLOCK = 512
"""Tokens that full attention reads at a time."""


def load(
    model: str,
    system: str = "fam",
    overrides: dict[str, Any] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer by the options of a command.

    Args:
        model: name or folder.
        system: which memory it gets.
        overrides: fields of its `FamConfig`.
        device: where it runs; each process of several takes its own.
        dtype: type of the weights; None leaves them as they are.

    Raises:
        TransformerFamError: there is no such model, device or type.
    """
    place = find_device(own_device(device))
    _require_dtype(dtype)
    loaded, tokenizer = load_model(model, system, overrides)
    if dtype is not None:
        hold_weights_in(dtype, loaded)
    return loaded.to(place), tokenizer


def load_plain(model: str, device: str = "cpu", dtype: str | None = None) -> tuple[Any, Any]:
    """Load the model under a memory, without one, and its tokenizer; arguments and errors are those of `load`."""
    place = find_device(own_device(device))
    _require_dtype(dtype)
    loaded, tokenizer = load_base(model)
    return loaded.to(place, None if dtype is None else getattr(torch, dtype)), tokenizer


def load_reader(model: str, system: str, device: str = "cpu", dtype: str | None = None) -> tuple[Any, Any]:
    """Load a model whose readings are kept in files, and its tokenizer; arguments and errors are those of `load`."""
    if system not in (*READERS, GATED):
        raise TransformerFamError(f"--system is {system!r}, required is one of {', '.join(READERS)}; choose one")
    loaded, tokenizer = load(model, "fam" if system == GATED else system, device=device, dtype=dtype)
    name_in_rows(system, loaded)  # which refuses fam_gated where the memory is not
    return loaded, tokenizer


def load_system(
    model: str, system: str, overrides: list[str] | None, device: str, dtype: str | None
) -> tuple[Any, Any]:
    """Load what answers for a system: the model with its memory, or the base model with all of the text in sight."""
    if system != FULL_CONTEXT:
        return load(model, system, parse_overrides(overrides), device, dtype)
    plain, tokenizer = load_plain(model, device, dtype)
    return attach(plain, RivalConfig(system="full", block_size=FULL_BLOCK)), tokenizer


def _require_dtype(dtype: str | None) -> None:
    if dtype not in (None, *FAM_DTYPES):
        raise TransformerFamError(f"--dtype is {dtype!r}, required is one of {', '.join(FAM_DTYPES)}; choose one")


def systems_by_model(systems: str | None) -> dict[str, list[str]]:
    """Group the names of systems by the model that serves them: controls query that of their system."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(part.strip() for part in (systems or "fam").split(",")):
        control = control_of(name)
        system = name if control is None else control[0]
        groups.setdefault("fam" if system == GATED else system, []).append(name)
    return groups


def named_with(model: str, overrides: list[str] | None, dtype: str | None) -> str:
    """Return the model's name for the rows, with what was changed: rows of one name are of one system.

    However a change was written, and in whatever order: `fam_key_bias = 0` is `fam_key_bias=0.0`.
    """
    changed, defaults = parse_overrides(overrides), FamConfig().to_dict()
    for name, value in changed.items():
        if type(defaults.get(name)) is float and type(value) is int:
            changed[name] = float(value)
    words = [
        f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in sorted(changed.items())
    ]
    return " ".join([model, *words, *([dtype] if dtype else [])])


@contextlib.contextmanager
def warnings_said() -> Iterator[None]:
    """Print every warning of the body as a line, the same one once."""
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always", UserWarning)
        yield
    for message in dict.fromkeys(str(warning.message) for warning in noted):
        say(message, always=True)
