"""How fast, against what a user would pick instead: one file per question. `python -m benchmarks --help`."""
