"""`python -m transformerfam` is the command `fam`, for launchers that start modules."""

from transformerfam.cli import app

app()
