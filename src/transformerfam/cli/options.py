"""Options that several commands have, written once."""

from typing import Annotated

import typer

from transformerfam.config import FAM_DTYPES
from transformerfam.fields import LARGEST_INTEGER

CONTROLS = ("fam_memory_zeroed", "fam_memory_swapped", "fam_memory_initial")
"""Those of `tasks.controls`, which takes seconds to import."""

ModelOption = Annotated[str, typer.Option("--model", help="tiny, smollm2, or a folder, also one that PEFT wrote.")]
SystemOption = Annotated[
    str | None,
    typer.Option(
        "--system",
        help="fam (the model's own memory, in rows fam_gated where it is gated), bswa, fam_untrained, "
        f"{', '.join(CONTROLS)}; several with commas. By default the model's own memory.",
    ),
]
OneSystemOption = Annotated[
    str,
    typer.Option("--system", help="fam (the model's own memory), bswa (its window alone), or fam_untrained."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help=f"Type of the weights, of {', '.join(FAM_DTYPES)}; as they are if not given."),
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 or another of torch.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="key=value; may be given more than once.")]
MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, max=LARGEST_INTEGER, help="Tokens of an answer at most.")
]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", min=0, max=100, help="How freely tokens are drawn; 0 takes the likeliest.")
]
TopPOption = Annotated[
    float, typer.Option("--top-p", min=0, max=1, help="Draw among the likeliest tokens of this share together.")
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", min=0, max=LARGEST_INTEGER, help="Draw the same tokens again.")
]
StopOption = Annotated[
    list[str] | None, typer.Option("--stop", help="A text before which an answer ends; may be given more than once.")
]
TemplateOption = Annotated[
    str, typer.Option("--prompt-template", help="What a question looks like, with {question} in it; \\n is a new line.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what this package wrote there.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, for programs.")]

OR_OVERWRITE = "add --overwrite to replace it, or "
"""What a message about a taken target adds in front of its remedy."""


def device_argument(device: str) -> str:
    """Return what a command that resumes needs to say of the device."""
    return "" if device == "cpu" else f" --device {device}"


def system_arguments(system: str) -> list[str]:
    """Return what a command that resumes needs to say of the system."""
    return [] if system == "fam" else ["--system", system]
