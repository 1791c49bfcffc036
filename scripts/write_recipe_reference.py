"""Write docs/reference/recipes.md, the reference of recipes, from what the package says of its keys."""

from pathlib import Path

from transformerfam.training.recipe.describe import reference_page

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "recipes.md"

if __name__ == "__main__":
    PAGE.write_text(reference_page(), encoding="utf-8")
