"""`python -m transformerfam` is the command `fam`, for launchers that start modules."""

from fam_command import main

main()
