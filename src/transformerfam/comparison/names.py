"""Names of runs, and what any name in a comparison has to be."""

from dataclasses import dataclass

from transformerfam.errors import RecipeError


@dataclass(frozen=True)
class RunName:
    """One training of one system."""

    system: str
    seed: int

    def __str__(self) -> str:
        return f"{self.system}-{self.seed}"

    @classmethod
    def parse(cls, text: str) -> "RunName":
        """Read what `str` gave.

        Raises:
            RecipeError: it is no name of a run.
        """
        system, _, seed = text.rpartition("-")
        if not system or not seed.isdecimal():
            raise RecipeError(f"{text!r} is no run, required is SYSTEM-SEED, for example fam-0")
        return cls(system, int(seed))


def require_plain_name(name: str) -> None:
    """Refuse a name that would be a folder elsewhere.

    Raises:
        RecipeError: it is empty, begins with a dot, or has a separator in it.
    """
    if not name or name.startswith(".") or not name.isprintable() or set(name) & set("/\\:"):
        raise RecipeError(
            f"the name {name!r} is no name of a folder, required is one without '/', '\\' and ':' that does not begin "
            "with a dot"
        )
