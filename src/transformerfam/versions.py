"""The versions of torch and transformers that the tests have passed on, and the messages where they matter.

A version above the range is not refused: the numeric checks of conversion decide. It is named where they fail.
"""

import importlib.metadata
import os
import sys
from typing import Any

from packaging.version import Version

from transformerfam.errors import MissingPackageError, UnsupportedModelError, UnsupportedVersionError

TESTED: dict[str, tuple[str, str]] = {"torch": ("2.8.0", "2.14.1"), "transformers": ("5.14.0", "5.24.0")}
"""Oldest and newest tested release; `docs/reference/versions.md` has what was found at each edge."""

UNCHECKED = "TRANSFORMERFAM_UNCHECKED_VERSIONS"
"""Set in the environment of `fam doctor`, which has to run with versions that it finds too old."""

OLDEST_PEFT = "0.21.0"

OLDEST_TORCH_THAT_SHARDS = "2.11.0"
"""Before it, `fully_shard` fails where a layer reads several blocks ahead of one backward pass and recomputes them
(pytorch/pytorch#153354)."""


def release(version: str) -> Version:
    """Return a version that compares by number, without what a build adds to it (`2.13.0+cpu`)."""
    return Version(version.split("+")[0])


def check_versions() -> None:
    """Refuse torch and transformers below the tested range, unless the environment has `UNCHECKED`.

    Raises:
        UnsupportedVersionError: names the version, the one required and the command that installs it.
    """
    if os.environ.get(UNCHECKED):
        return
    for package, installed in installed_versions().items():
        oldest = TESTED[package][0]
        if release(installed) < release(oldest):
            raise UnsupportedVersionError(
                f"{package} is {installed}, required is at least {oldest}; install it with: "
                f"pip install '{package}>={oldest}'"
            )


def does_not_fit(reason: str) -> UnsupportedModelError:
    """Return the error of a model that differs from what conversion knows of its family.

    Args:
        reason: what differs.

    Returns:
        An error that also says whether the installed versions were tested, and so may be the cause.
    """
    return UnsupportedModelError(f"{reason}; {_likely_cause()}", reason)


def _likely_cause() -> str:
    newer = [
        f"{package} {installed} is newer than any we tested ({TESTED[package][1]})"
        for package, installed in installed_versions().items()
        if release(installed) > release(TESTED[package][1])
    ]
    if not newer:
        versions = " and ".join(f"{package} {installed}" for package, installed in installed_versions().items())
        return f"{versions} are tested versions, so it is this model that differs from what its family does"
    remedies = " ".join(f"'{package}<={newest}'" for package, (_, newest) in TESTED.items())
    return f"{' and '.join(newer)}, and may have changed this family; try: pip install {remedies}"


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages in `TESTED`, which are not imported for it."""
    return {
        name: str(sys.modules[name].__version__) if name in sys.modules else importlib.metadata.version(name)
        for name in TESTED
    }


def require_peft() -> Any:
    """Import PEFT.

    Raises:
        MissingPackageError: it is not installed.
        UnsupportedVersionError: it is too old for this package, or for the installed transformers.
    """
    try:
        installed = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingPackageError(
            "LoRA needs the package peft, which is not installed; install it with: pip install 'transformerfam[train]'"
        ) from error
    remedy = f"install a newer one with: pip install -U 'peft>={OLDEST_PEFT}'"
    if release(installed) < release(OLDEST_PEFT):
        raise UnsupportedVersionError(f"peft is {installed}, required is at least {OLDEST_PEFT}; {remedy}")
    try:
        import peft
    except (ImportError, AttributeError) as error:  # a name of transformers that it knew is gone
        raise UnsupportedVersionError(
            f"peft {installed} does not know transformers {installed_versions()['transformers']} ({error}); {remedy}"
        ) from error
    return peft
