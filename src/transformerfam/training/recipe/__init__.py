"""Recipes: sections of typed fields (`sections`, on pydantic), their ranges, the whole (`recipe`), the file (`toml`).

A field is one line in its section, its meaning the string under it. May import: `tasks`, `rivals`, `decoder`, and the
root of the package.
"""

from transformerfam.old_paths import names_of

__getattr__ = names_of("transformerfam.training.recipe", "transformerfam.training.recipe.recipe")
