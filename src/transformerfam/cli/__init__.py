"""The command `fam`: one file per group of commands, their output, errors and bars.

Nothing else of the package prints, or imports typer. `commands` holds those that read, generate, train and evaluate.

May import: every other room.
One more command: a file with a function, added to the application in `commands`.
"""

from transformerfam.old_paths import names_of

__getattr__ = names_of("transformerfam.cli", "transformerfam.cli.commands")
