"""`python -m transformerfam.cli` is the command `fam`."""

from fam_command import main

main()
