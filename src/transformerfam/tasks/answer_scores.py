"""How good an answer is: exact match and F1 as SQuAD counts them, an answer contained in it, and none given."""

import re
from collections.abc import Sequence
from typing import Any

from transformerfam.errors import MissingPackageError

ABSTAINING = re.compile(
    r"\b(unanswerable|unknown|no answer|not (mentioned|stated|given|known|specified|provided|say)|(do not|don't) know"
    r"|cannot be answered)\b",
    re.IGNORECASE,
)
"""Words by which a model says that it has no answer; an empty answer says so, too."""


def score_answer(answer: str, wanted: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a row that say how good an answer is.

    Args:
        answer: what a model said.
        wanted: the answers that count; none: it should say that it has none.

    Returns:
        `abstained`; and `exact_match` (0 or 1), `f1` (0 to 1) and `contains`, the best over the answers that count.
        Where there is no answer, all three say whether it abstained.

    Raises:
        MissingPackageError: torchmetrics, whose SQuAD metric this is, is not installed.
    """
    abstained = not answer.strip() or ABSTAINING.search(answer) is not None
    if not wanted:
        right = float(abstained)
        return {"abstained": abstained, "exact_match": right, "f1": right, "contains": abstained}
    try:
        from torchmetrics.functional.text import squad
    except ImportError as error:
        raise MissingPackageError(
            'torchmetrics is needed to score answers; pip install "transformerfam[answers]"'
        ) from error
    targets: dict[str, Any] = {"answers": {"text": list(wanted), "answer_start": [0] * len(wanted)}, "id": "0"}
    scores = squad({"prediction_text": answer, "id": "0"}, targets)
    return {
        "abstained": abstained,
        "exact_match": float(scores["exact_match"]) / 100,
        "f1": round(float(scores["f1"]) / 100, 6),
        "contains": any(_contains(answer, one) for one in wanted),
    }


def _contains(answer: str, wanted: str) -> bool:
    """Say whether an answer holds another as whole words, whatever their case."""
    words = r"\W+".join(map(re.escape, re.findall(r"\w+", wanted)))
    return bool(words) and re.search(rf"\b{words}\b", answer, re.IGNORECASE) is not None
