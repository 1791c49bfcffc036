"""The subcommand `fam data export`: a file of questions as tasks of lm-evaluation-harness."""

from pathlib import Path
from typing import Annotated

import typer

from transformerfam.cli.evaluate_answers import SHOWN_TEMPLATE
from transformerfam.cli.options import JsonOption, MaxNewTokensOption, TemplateOption
from transformerfam.cli.output import print_json, say
from transformerfam.tasks.answers import QuestionFile
from transformerfam.tools.lm_eval_tasks import write_tasks


def export_command(
    questions: Annotated[Path, typer.Argument(help="JSON lines, as fam evaluate answers takes them.")],
    output: Annotated[Path, typer.Option("--output", help="A new folder, for the harness's --include_path.")],
    max_new_tokens: MaxNewTokensOption = 32,
    prompt_template: TemplateOption = SHOWN_TEMPLATE,
    as_json: JsonOption = False,
) -> None:
    """Write questions as tasks of lm-evaluation-harness, by which any of its models can be asked the same."""
    names = write_tasks(QuestionFile(questions), output, prompt_template.replace("\\n", "\n"), max_new_tokens)
    say(
        f"run them: python -m transformerfam.tools.lm_eval run --model fam --model_args pretrained=FOLDER --tasks "
        f"{','.join(names)} --include_path {output}"
    )
    if as_json:
        print_json({"folder": output, "tasks": names})
    else:
        typer.echo(output)
