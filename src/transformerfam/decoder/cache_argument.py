"""The name of the argument that carries the cache: `past_key_values` before transformers 5.24, `cache` from then on.

A converted model takes both names in every version and hands the version's own name on, so that nothing it is given is
lost and no deprecation warning appears. Outputs carry the version's own name.
"""

import dataclasses
from typing import Any

from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from transformerfam.errors import TransformerFamError

NEW_NAME, OLD_NAME = "cache", "past_key_values"
CACHE_NAME = NEW_NAME if NEW_NAME in {f.name for f in dataclasses.fields(BaseModelOutputWithPast)} else OLD_NAME
"""What the installed transformers calls the cache in its models' arguments and outputs."""

LAYER_NAMES = (NEW_NAME, OLD_NAME, "layer_past")
"""What the layers of some family call it in some version."""


def as_cache(cache: Any) -> dict[str, Any]:
    """Return `cache` as the keyword argument, or the field of an output, of the installed transformers."""
    return {CACHE_NAME: cache}


def cache_in(kwargs: dict[str, Any]) -> Any:
    """Return the cache that a layer or an attention was called with, or None."""
    for name in LAYER_NAMES:  # torch 2.8 cannot compile `next` with a default
        if kwargs.get(name) is not None:
            return kwargs[name]
    return None


def take_cache(kwargs: dict[str, Any], positional: Any = None) -> Any:
    """Take the cache out of a call's keyword arguments, under either name, and return it, or None.

    Args:
        kwargs: of the call; neither name is left in it.
        positional: the cache where it was not given by keyword.

    Raises:
        TransformerFamError: two caches are given.
    """
    given = [positional, *(kwargs.pop(name, None) for name in (NEW_NAME, OLD_NAME))]
    caches = [cache for cache in given if cache is not None]
    if len(caches) > 1:
        raise TransformerFamError(
            f"two caches are given: {NEW_NAME} and {OLD_NAME} are two names of one argument; give it once"
        )
    return caches[0] if caches else None


def rename_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's keyword arguments with the cache under the installed transformers' name.

    Raises:
        TransformerFamError: both names are given, or one with a cache among the positional arguments.
    """
    rest = dict(kwargs)
    positional = [value for value in args if isinstance(value, Cache)]
    cache = take_cache(rest, *positional[:1])
    return rest if cache is None or positional else rest | as_cache(cache)
