"""The subcommand `fam convert`."""

from pathlib import Path
from typing import Annotated

import typer

from transformerfam.cli.loading import load, warnings_said
from transformerfam.cli.options import OR_OVERWRITE, JsonOption, OverwriteOption, SetOption
from transformerfam.cli.output import tell
from transformerfam.config import UPDATE_PRESETS, FamConfig
from transformerfam.fam.prompt import set_prompt
from transformerfam.rivals.presets import NUM_SINK_TOKENS
from transformerfam.tasks.text import encode_rest, encode_start
from transformerfam.tasks.unknown_words import say_unknown
from transformerfam.training.recipe.toml import parse_overrides
from transformerfam.weights.folders import require_own_folder
from transformerfam.weights.models import save_model

PROMPT_TEXT = (
    ".\nHere is what has been read so far: who is there, what they said and did, where and when it happened, which "
    "names and numbers were given, what was promised, what was asked and what is still open. Who reads on will need "
    "to know all of this, and nothing of it stands anywhere else."
)
"""What the prompt of a gated memory begins as; see docs/explanation/update.md, "What it costs a model that was not
trained"."""


def convert_command(
    model: Annotated[str, typer.Argument(help="smollm2, or a folder that transformers loads or PEFT wrote.")],
    output: Annotated[Path, typer.Argument(help="Folder for the converted model.")],
    preset: Annotated[
        str,
        typer.Option("--preset", help=f"Of {', '.join(UPDATE_PRESETS)}; --set changes fields of it."),
    ] = "gated",
    prompt_text: Annotated[
        str | None, typer.Option("--prompt-text", help="Text whose first tokens the memory's prompt begins as.")
    ] = None,
    overwrite: OverwriteOption = False,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a model an untrained memory, and save it with its weights; gated with 4 sink tokens."""
    require_own_folder(output, is_model=True, overwrite=overwrite, remedy=OR_OVERWRITE)
    sinks = {"num_sink_tokens": NUM_SINK_TOKENS} if FamConfig.preset(preset).has_slots else {}
    changes = FamConfig.preset(preset, **sinks | parse_overrides(overrides)).to_dict()
    converted, tokenizer = load(model, "fam_untrained", changes)
    config = converted.fam_config
    if config.fam_length and config.fam_init == "prompt" and (preset != "paper" or prompt_text is not None):
        text = PROMPT_TEXT if prompt_text is None else prompt_text
        ids = encode_start(tokenizer, text)
        with warnings_said():
            say_unknown(tokenizer, encode_rest(tokenizer, text), "the prompt text")
        set_prompt(converted, (ids * -(-config.fam_length // max(1, len(ids))))[: config.fam_length])
    save_model(converted, tokenizer, output)
    message = (
        f"{type(converted).__name__} in {output}: {preset}, block_size {config.block_size}, fam_length "
        f"{config.fam_length}, num_memory_segments {config.num_memory_segments}, num_sink_tokens "
        f"{config.num_sink_tokens}; train its memory with fam train"
    )
    facts = {"folder": output, "class": type(converted).__name__, "preset": preset, "fam_config": config.to_dict()}
    tell(facts, message, as_json)
