"""Recipes: sections of typed fields (`sections`), their ranges (`ranges`), the whole (`recipe`), the file (`toml`).

May import: `tasks`, `rivals`, `decoder`, and the root of the package.
"""

from transformerfam.old_paths import names_of

__getattr__ = names_of("transformerfam.training.recipe", "transformerfam.training.recipe.recipe")
