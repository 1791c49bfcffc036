"""Folders of converted models: written by `save_pretrained`, loaded by `transformerfam.from_pretrained`.

Such a folder is what transformers writes, with `fam.safetensors` next to it, and in `config.json` the configuration of
the memory under `fam_config` and an architecture that only this package knows (`FamLlamaForCausalLM`): servers look
their models up by it, and so refuse a model that they would serve without its memory. transformers' own
`from_pretrained` gives the base model, and the converted one where `install` was called.
"""

import contextlib
import contextvars
import functools
import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from transformerfam.config import FamConfig
from transformerfam.errors import CorruptFileError, MissingPackageError, TransformerFamError, UnsupportedModelError
from transformerfam.fam.convert import memory_of
from transformerfam.files.reading import parse_json, read_whole, refuse_endless
from transformerfam.files.writing import share_rights, write_bytes
from transformerfam.weights.adapter import FamAdapter
from transformerfam.weights.folders import CONFIG_FILE, FAM_FILE
from transformerfam.weights.peft_adapters import LORA_CONFIG_FILE, has_adapters

CONFIG_KEY = "fam_config"
ARCHITECTURE_PREFIX = "Fam"
CODE_KEY = "auto_map"  # classes in Python files of the folder
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation")  # or a repository of kernels
OWN_ROWS = r"(^|\.)fam\.(prompt|prefix)$"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")

_loading = threading.RLock()
"""Held by a load: two of transformers' at a time leave parts of it changed that each had changed for itself."""

_is_plain = contextvars.ContextVar("is_plain", default=False)


@contextlib.contextmanager
def plain_loading() -> Iterator[None]:
    """Let `from_pretrained` give the base model of a folder, without its memory."""
    token = _is_plain.set(True)
    try:
        yield
    finally:
        _is_plain.reset(token)


class _WithoutOwnRows(logging.Filter):
    """Drops transformers' report of a load, in this thread, where all that it names are rows of a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is shown."""
        named = re.findall(r"^(\S+) *\| (?!Status)[A-Z]+", record.getMessage(), re.MULTILINE)
        own = record.thread == self.thread and named and all(re.search(OWN_ROWS, name) for name in named)
        return not own


@contextlib.contextmanager
def _own_rows_expected() -> Iterator[None]:
    """Let transformers take rows of a memory among the weights without a word: they come from `fam.safetensors`."""
    logger, shown = logging.getLogger("transformers.modeling_utils"), _WithoutOwnRows()
    logger.addFilter(shown)
    try:
        yield
    finally:
        logger.removeFilter(shown)


def load_pretrained(
    kind: Any,
    folder: str | os.PathLike[str],
    local_files_only: bool = True,
    source: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Any:
    """Call `from_pretrained` of a transformers class, which never runs code of the folder, nor prompts for permission.

    Args:
        kind: the class, for example `AutoTokenizer`.
        folder: what to load.
        local_files_only: look for nothing on the Hub.
        source: where its files are read; None is the folder.
        **options: passed on to `from_pretrained`.

    Raises:
        UnsupportedModelError: it needs code of the folder; the message names the file and the key.
        MissingPackageError: it needs a package that is not installed, for example that of a quantization.
        CorruptFileError: whatever else `from_pretrained` raises.
    """
    _require_files(Path(folder))
    for file, key, value in _code_in(folder):
        if key in KERNEL_KEYS:
            raise UnsupportedModelError(
                f"{folder} names code to run, {key} = {value!r} in {file}, and no such code is run; remove the key"
            )
    try:
        found = folder if source is None else source
        with _loading, _own_rows_expected():
            return kind.from_pretrained(found, trust_remote_code=False, local_files_only=local_files_only, **options)
    except Exception as error:
        for file, key, _ in _code_in(folder):
            raise UnsupportedModelError(
                f"{folder} needs its own code, {key} in {file}, and no code of a folder is run; take a model that "
                "transformers has itself"
            ) from error
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, ImportError):
            raise MissingPackageError(
                f"{folder} needs a package that is not installed, or another version of it ({reason}); install it"
            ) from error
        what = "tokenizer" if "Tokenizer" in kind.__name__ else "model"
        raise CorruptFileError(f"{folder} holds no {what} that can be read ({reason}); copy it again") from error


def _require_files(folder: Path) -> None:
    """Refuse a folder with pipes or devices, whose reading waits or never ends."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            refuse_endless(path)
        except OSError as error:
            raise CorruptFileError(f"{path} is not a readable file: {error.strerror}") from error


def load_pretrained_model(kind: Any, folder: str | os.PathLike[str], **options: Any) -> PreTrainedModel:
    """Call `load_pretrained` of a class of models, every weight of which is in the folder, without LoRA.

    Raises:
        UnsupportedModelError: as for `load_pretrained`.
        CorruptFileError: as for it; or weights are missing, or some that are there are of no part of its layers.
    """
    with _without_adapter(Path(folder)) as source:
        model, found = load_pretrained(kind, folder, source=source, output_loading_info=True, **options)
    model.name_or_path = model.config._name_or_path = str(folder)
    require_weights(model, found, folder)
    return model


@contextlib.contextmanager
def _without_adapter(folder: Path) -> Iterator[Path]:
    """Yield a folder of the same files but for LoRA, which transformers would put into the base model."""
    if not (folder / LORA_CONFIG_FILE).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as view:
        for path in folder.iterdir():
            if path.name != LORA_CONFIG_FILE:
                (Path(view) / path.name).symlink_to(path.resolve())
        yield Path(view)


def require_weights(model: PreTrainedModel, found: Mapping[str, Any], folder: str | os.PathLike[str] | None) -> None:
    """Refuse a model with weights that transformers drew at random, or with layers that lack what is stored for them.

    What is stored besides the layers, for example a vision tower, may be left out.

    Args:
        model: as `from_pretrained` gives it.
        found: what `from_pretrained` gives with `output_loading_info`.
        folder: where it came from, for the message.

    Raises:
        CorruptFileError: the message names the weights.
    """
    missing = sorted({*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])})
    if missing:
        raise CorruptFileError(
            f"{folder} lacks {_some(missing)}, which transformers would draw at random; copy the model again, with all "
            "of its files"
        )
    lists = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    unused = sorted(name for name in found["unexpected_keys"] if name.startswith(lists))
    if unused:
        raise CorruptFileError(
            f"{folder} holds {_some(unused)}, which the layers of {type(model).__name__} would leave out; required is "
            "the config.json that belongs to these weights"
        )


def _some(names: list[str]) -> str:
    """Return the first of many names, and how many more there are."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def _code_in(folder: str | os.PathLike[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield file, key and value of what names code in the JSON files of a folder."""
    for path in sorted(Path(folder).glob("*config.json")):
        try:
            waiting = [parse_json(read_whole(path))]
        except (OSError, ValueError):  # loading it says what is wrong
            continue
        while waiting:
            values = waiting.pop()
            for key, value in values.items() if isinstance(values, dict) else ():
                waiting.append(value)  # of a part, for example of the text model
                if value and (key == CODE_KEY or (key in KERNEL_KEYS and "/" in str(value))):
                    yield path.name, key, value


def save_pretrained(self: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """Write a converted model as transformers does, with its memory next to it.

    Args:
        self: the converted model.
        save_directory: where to.
        *args: passed on to the class's own method.
        **kwargs: passed on to it.

    Raises:
        TransformerFamError: the model has LoRA, which is saved with `FamAdapter.from_model(model).save_pretrained`.
    """
    if has_adapters(self):
        raise TransformerFamError(
            "the model has LoRA; save it with FamAdapter.from_model(model).save_pretrained(folder)"
        )
    setattr(self.config, CONFIG_KEY, memory_of(self).config.to_dict())
    try:
        type(self).save_pretrained(self, save_directory, *args, **kwargs)
    finally:
        delattr(self.config, CONFIG_KEY)
    if not kwargs.get("is_main_process", True):  # one process of several writes
        return
    path = Path(save_directory) / CONFIG_FILE
    if path.exists():
        values = parse_json(read_whole(path))
        values["architectures"] = [f"{ARCHITECTURE_PREFIX}{name}" for name in values["architectures"]]
        write_bytes(path, f"{json.dumps(values, indent=2, sort_keys=True)}\n".encode())
        share_rights(save_directory, CONFIG_FILE)
    FamAdapter.from_model(self).save_pretrained(save_directory)


def load_with_memory(kind: Any, name_or_folder: str | os.PathLike[str], **options: Any) -> PreTrainedModel:
    """Load a converted model by a class of transformers', with its memory.

    Args:
        kind: the class, for example `AutoModelForCausalLM`.
        name_or_folder: of a model that `save_pretrained` wrote.
        **options: passed on to the class's `from_pretrained`.

    Raises:
        TransformerFamError: the model is not converted, or as for `load_pretrained`.
    """
    if options.pop("output_loading_info", False):
        raise TransformerFamError(
            "output_loading_info is given, and a model that lacks weights is refused here; leave it out"
        )
    with plain_loading():
        model, found = load_pretrained(kind, name_or_folder, output_loading_info=True, **options)
    if getattr(model.config, CONFIG_KEY, None) is None:
        raise TransformerFamError(
            f"{name_or_folder} holds a model without a memory ({CONFIG_KEY} is missing in its {CONFIG_FILE}); load it "
            "with transformers' from_pretrained, and call convert(model, FamConfig(...))"
        )
    _give_memory(model, name_or_folder, options, found)
    return model


def _give_memory(
    model: Any, name_or_folder: str | os.PathLike[str], options: dict[str, Any], found: Mapping[str, Any]
) -> None:
    """Convert a model that was saved converted, in place, and give it its memory."""
    require_weights(model, found, name_or_folder)
    hub = {name: options[name] for name in HUB_ARGUMENTS if name in options}
    path = cached_file(name_or_folder, FAM_FILE, **hub)
    adapter = FamAdapter.from_pretrained(os.path.dirname(str(path)))
    require_one_configuration(model, adapter.config, name_or_folder)
    delattr(model.config, CONFIG_KEY)
    adapter.apply(model)


def require_one_configuration(model: Any, config: FamConfig, folder: str | os.PathLike[str]) -> None:
    """Refuse a folder whose `config.json` and `fam.safetensors` have different configurations of the memory.

    Args:
        model: as `config.json` describes it; without `fam_config` there it passes.
        config: in `fam.safetensors`.
        folder: of both, for the message.

    Raises:
        CorruptFileError: the message names the first field that differs.
    """
    stored = getattr(model.config, CONFIG_KEY, None)
    if stored is None:
        return
    try:
        there = FamConfig.from_dict(stored).to_dict()
    except (TransformerFamError, TypeError, AttributeError) as error:
        raise CorruptFileError(
            f"{folder}/{CONFIG_FILE} has a {CONFIG_KEY} that is invalid ({error}); remove the key, since {FAM_FILE} "
            "has it"
        ) from error
    for name, value in config.to_dict().items():
        if there[name] != value:
            raise CorruptFileError(
                f"{folder}/{CONFIG_FILE} has {there[name]!r} as {name} of {CONFIG_KEY}, and {FAM_FILE} "
                f"{value!r}, which is what its memory was saved with; make them equal, and change a field when the "
                f"model is loaded: load_model(folder, config_overrides={{{name!r}: ...}}), or --set {name}=..."
            )


class _Transformers(type(transformers)):  # type: ignore[misc]
    """transformers where the architecture of a converted model is its base's class, which loads it with its memory."""

    def __getattr__(self, name: str) -> Any:
        is_installed = hasattr(PreTrainedModel.from_pretrained, "takes_memory")
        return super().__getattr__(name.removeprefix(ARCHITECTURE_PREFIX) if is_installed else name)


def install() -> None:
    """Let transformers' own `from_pretrained` give converted models back, of every class with a language-model head.

    For tools that load models themselves, as `pipeline("text-generation", FOLDER)`. Twice is once.
    """
    original = PreTrainedModel.from_pretrained.__func__
    transformers.__class__ = _Transformers
    if hasattr(original, "takes_memory"):
        return

    @functools.wraps(original)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        options = kwargs | {"output_loading_info": True}
        with _loading, _own_rows_expected():
            model, found = original(cls, pretrained_model_name_or_path, *args, **options)
        is_converted = getattr(model.config, CONFIG_KEY, None) is not None
        if pretrained_model_name_or_path is not None and is_converted and not _is_plain.get():
            if model.can_generate():
                _give_memory(model, pretrained_model_name_or_path, kwargs, found)
            else:
                delattr(model.config, CONFIG_KEY)
        return (model, found) if kwargs.get("output_loading_info") else model

    from_pretrained.takes_memory = True  # type: ignore[attr-defined]
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
