"""Where the command `fam` begins: Ctrl-C while its modules are loaded, which takes seconds, leaves no traceback.

It is no part of `transformerfam`, whose import is what takes the time.
"""

import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command."""
    try:
        from transformerfam.cli import overview

        if overview.is_asked_for(sys.argv[1:]):
            overview.show(sys.argv[1:])
        from transformerfam.cli.app import app
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)
    app()
