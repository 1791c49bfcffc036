"""How much a command says, and what it sets in other libraries for that."""

import contextlib
import importlib.metadata
import logging
import os
import platform
import sys
from collections.abc import Iterator
from enum import IntEnum

from transformerfam.versions import installed_versions

TRANSFORMERS_VERBOSITY = "TRANSFORMERS_VERBOSITY"
"""What transformers reads of the environment when it is imported."""


class Verbosity(IntEnum):
    """How much is said: results and errors; also notes and progress; also what libraries log."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


class Level:
    """The verbosity of the command that runs."""

    def __init__(self) -> None:
        self.value = Verbosity.NORMAL

    @property
    def is_quiet(self) -> bool:
        """Whether results and errors alone are printed."""
        return self.value is Verbosity.QUIET

    @contextlib.contextmanager
    def set_to(self, value: Verbosity) -> Iterator[None]:
        """Let a verbosity hold in the body, for other libraries as well."""
        before, self.value = self.value, value
        level = logging.ERROR if value is Verbosity.QUIET else logging.INFO
        loggers = [logging.getLogger(), logging.getLogger("transformers")]
        levels = [logger.level for logger in loggers]
        named = os.environ.get(TRANSFORMERS_VERBOSITY)
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        if value is Verbosity.VERBOSE:
            loggers[0].addHandler(handler)
        try:
            for logger in loggers:
                logger.setLevel(level)
            os.environ.setdefault(TRANSFORMERS_VERBOSITY, logging.getLevelName(level).lower())
            yield
        finally:
            self.value = before
            loggers[0].removeHandler(handler)
            for logger, old in zip(loggers, levels, strict=True):
                logger.setLevel(old)
            if named is None:
                os.environ.pop(TRANSFORMERS_VERBOSITY, None)


LEVEL = Level()


def hide_loading_bars() -> None:
    """Turn off transformers' progress bars: a command has its own."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def versions_text() -> str:
    """Return the versions of this package and of what its numbers depend on, which are not imported for it."""
    parts = [f"transformerfam {importlib.metadata.version('transformerfam')}"]
    parts += [f"{name} {version}" for name, version in installed_versions().items()]
    return ", ".join([*parts, f"Python {platform.python_version()}"])
