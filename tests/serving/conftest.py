"""Tests of the server are left out where its packages (the extras `serve` and `dev`) are not installed."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("fastapi") and find_spec("openai") else ["test_*.py"]
