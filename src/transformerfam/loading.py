"""Let transformers' own `save_pretrained` and `from_pretrained` take the memory along.

The folder of a converted model is what transformers writes, with `fam.safetensors` beside it and the configuration of
the memory under `fam_config` in `config.json`. Where this package is imported, `from_pretrained` of any class with a
language-model head gives such a folder back converted; elsewhere it gives the base model.
"""

import contextlib
import contextvars
import functools
import os
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import cached_file

from transformerfam.adapter import FAM_FILE, FamAdapter
from transformerfam.convert import METHODS, memory_of
from transformerfam.errors import TransformerFamError
from transformerfam.peft_adapters import has_adapters

CONFIG_KEY = "fam_config"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
IGNORED_WEIGHTS = r"(^|\.)fam\.(prompt|prefix)$"  # they come from `fam.safetensors`

_is_plain = contextvars.ContextVar("is_plain", default=False)


@contextlib.contextmanager
def plain_loading() -> Iterator[None]:
    """Let `from_pretrained` give the base model of a folder, without its memory."""
    token = _is_plain.set(True)
    try:
        yield
    finally:
        _is_plain.reset(token)


def save_pretrained(self: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """Write a converted model as transformers does, and its memory beside it.

    Args:
        self: the converted model.
        save_directory: where to.
        *args: go on to the class's own method.
        **kwargs: go on to it.

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
    FamAdapter.from_model(self).save_pretrained(save_directory)


def _with_memory(model: Any, name_or_folder: str | os.PathLike[str], kwargs: dict[str, Any]) -> None:
    """Convert a model that was saved converted, in place, and give it its memory."""
    if getattr(model.config, CONFIG_KEY, None) is None:
        return
    delattr(model.config, CONFIG_KEY)
    if _is_plain.get() or not model.can_generate():
        return
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    path = cached_file(name_or_folder, FAM_FILE, **hub)
    FamAdapter.from_pretrained(os.path.dirname(str(path))).apply(model)


def install() -> None:
    """Let `from_pretrained` of every transformers model take the memory along; once."""
    original = PreTrainedModel.from_pretrained.__func__
    if hasattr(original, "takes_memory"):
        return

    @functools.wraps(original)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        own = cls.__dict__.get("_keys_to_ignore_on_load_unexpected")
        inherited = cls._keys_to_ignore_on_load_unexpected
        cls._keys_to_ignore_on_load_unexpected = [*(inherited or []), IGNORED_WEIGHTS]
        try:
            loaded = original(cls, pretrained_model_name_or_path, *args, **kwargs)
        finally:
            if own is None:
                del cls._keys_to_ignore_on_load_unexpected
            else:
                cls._keys_to_ignore_on_load_unexpected = own
        if pretrained_model_name_or_path is not None:
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            _with_memory(model, pretrained_model_name_or_path, kwargs)
        return loaded

    from_pretrained.takes_memory = True  # type: ignore[attr-defined]
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


METHODS["save_pretrained"] = save_pretrained
install()
