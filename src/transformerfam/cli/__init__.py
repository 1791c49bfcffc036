"""The command `fam`: one file per command, and what they share: options, loading, output, errors and bars.

Nothing else of the package prints, or imports typer.

May import: every other room.
One more command: a file with a function, added to the list in `commands`.
"""

from transformerfam.old_paths import names_of

__getattr__ = names_of("transformerfam.cli", "transformerfam.cli.app")
