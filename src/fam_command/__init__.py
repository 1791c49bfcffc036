"""Where the command `fam` begins: what is wrong before its first line runs ends in one line, not in a traceback.

It is no part of `transformerfam`, which refuses to be imported with a torch or transformers that is too old.
"""

import io
import os
import sys

INTERRUPTED, FAILED = 130, 2
DOCTOR = "doctor"
UNCHECKED = "TRANSFORMERFAM_UNCHECKED_VERSIONS"
"""In the environment of `fam doctor`, which says itself what is too old."""

NO_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"


def main() -> None:
    """Run the command; what the terminal's encoding lacks is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault(NO_BARS, "1")  # of loading, before transformers is imported: a command has its own
    if next((word for word in sys.argv[1:] if not word.startswith("-")), None) == DOCTOR:
        os.environ[UNCHECKED] = "1"
    try:
        from transformerfam.cli.app import app
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)
    except (ImportError, ValueError) as error:  # torch or transformers is missing, or too old
        sys.stderr.write(f"error: {error}; fam doctor says what works\n")
        sys.exit(FAILED)
    app()
