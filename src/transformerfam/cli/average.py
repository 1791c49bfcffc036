"""The subcommand `fam average`."""

from pathlib import Path
from typing import Annotated

import typer

from transformerfam.cli.options import OR_OVERWRITE, JsonOption, OverwriteOption, SetOption
from transformerfam.cli.output import tell
from transformerfam.training.averaging import average_memories
from transformerfam.training.recipe.toml import parse_overrides
from transformerfam.weights.folders import require_own_folder


def average_command(
    memories: Annotated[list[Path], typer.Argument(help="Folders of memories that were trained from one start.")],
    output: Annotated[Path, typer.Option("--output", help="Folder of the mean.")],
    overwrite: OverwriteOption = False,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Average the weights of memories; --set changes what the mean is read with."""
    require_own_folder(output, is_model=False, overwrite=overwrite, remedy=OR_OVERWRITE)
    average_memories(memories, output, parse_overrides(overrides))
    facts = {"folder": output, "memories": memories}
    tell(facts, f"the mean of {len(memories)} memories is in {output}", as_json)
