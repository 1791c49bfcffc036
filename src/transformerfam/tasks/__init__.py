"""Tasks: what a model reads, the questions it gets, and how the answers become rows.

A task has a module that writes its texts (`passkey`, `named_keys`, `facts`), one that evaluates (`..._evaluation`;
passkeys also have `passkey_questions` and `passkey_reading`), and one that writes training sequences, with its section
of a recipe (`..._training`). `next_token` and `document_losses` score texts. `answers_evaluation` asks the questions of
a file, those of benchmarks too: `made_questions` fits them to a length, `ruler`, `babilong` and `longbench` write them.
They share the texts (`text`, `unknown_words`, `filler`, `novels`, `documents`, `haystack`, `placed_text`), their
wordings, readings in constant memory (`reading`, `ragged`), the controls, and where a row comes from (`provenance`).

May import: `weights`, `fam`, `decoder`, `reports`, `sources`, and the root of the package.
One more task: a module each, or one for all, and a line in `registry`, which also names what compares it.
"""

from transformerfam.tasks.filler import FillerStream
from transformerfam.tasks.next_token import evaluate_next_token
from transformerfam.tasks.passkey import PasskeySequence, PasskeyText, build_passkey, draw_keys
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
