"""Tasks: what a model reads, what it is asked, and how the answers become rows."""

from transformerfam.tasks.next_token import evaluate_next_token
from transformerfam.tasks.passkey import FillerStream, PasskeySequence, PasskeyText, build_passkey, draw_keys
from transformerfam.tasks.passkey_evaluation import PasskeyEvaluation, evaluate_passkey

__all__ = [
    "FillerStream",
    "PasskeyEvaluation",
    "PasskeySequence",
    "PasskeyText",
    "build_passkey",
    "draw_keys",
    "evaluate_next_token",
    "evaluate_passkey",
]
