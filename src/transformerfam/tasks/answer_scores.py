"""How good an answer is: as SQuAD counts it, and by the rules of benchmarks that people quote."""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from transformerfam.errors import MissingPackageError

SQUAD = "squad"
NO_ANSWER = re.compile(r"(n/?a|none|nothing|unknown|unanswerable|no (answer|idea|information))", re.IGNORECASE)
"""A whole answer that is none; an empty one is, too."""
ABSTAINING = re.compile(
    r"(\b(not|\w+n't) (know|sure|say|mention|state|specify|provide|give|contain)(ed)?"
    r"|not (mentioned|stated|specified|provided|given|known|clear)"
    r"|cannot (be )?(answer|determine|tell|say)(ed|d)?|unanswerable)\b",
    re.IGNORECASE,
)
"""Words of a first sentence by which a model says that it has no answer."""
UNSPACED = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
ROUGE_WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
"""A word; of Thai, Japanese and Chinese, which have no spaces, a character."""
PUNCTUATION = ".,;:!?\"'()[]\u2018\u2019\u201c\u201d"


def abstains(answer: str) -> bool:
    """Say whether an answer is that there is none."""
    plain = answer.replace("\u2019", "'").strip()
    first = re.split(r"[.!?](\s|$)", plain, maxsplit=1)[0]
    return NO_ANSWER.fullmatch(first.strip(PUNCTUATION + " ")) is not None or (
        not first or ABSTAINING.search(first) is not None
    )


def score_answer(answer: str, wanted: Sequence[str], scorer: str = SQUAD) -> dict[str, Any]:
    """Return the fields of a row that say how good an answer is.

    Args:
        answer: what a model said.
        wanted: the answers that count; none (of "squad" alone): it should say that it has none.
        scorer: one of `SCORERS`.

    Returns:
        `scorer` and `score` (0 to 1). Of "squad", `abstained` instead; and `exact_match` (0 or 1), `f1` (0 to 1) and
        `contains`, the best over the answers that count. Where there is no answer, all three say whether it abstained.

    Raises:
        MissingPackageError: torchmetrics, whose SQuAD metric this is, or rouge-score is not installed.
    """
    score = SCORERS[scorer]
    if score is not None:
        return {"scorer": scorer, "score": round(score(answer, wanted), 6)}
    abstained = abstains(answer)
    if not wanted:
        right = float(abstained)
        return {"abstained": abstained, "exact_match": right, "f1": right, "contains": abstained}
    squad = squad_metric()
    targets: dict[str, Any] = {"answers": {"text": list(wanted), "answer_start": [0] * len(wanted)}, "id": "0"}
    scores = squad({"prediction_text": answer, "id": "0"}, targets)
    return {
        "abstained": abstained,
        "exact_match": float(scores["exact_match"]) / 100,
        "f1": round(float(scores["f1"]) / 100, 6),
        "contains": any(_contains(answer, one) for one in wanted),
    }


def contains_all(answer: str, wanted: Sequence[str]) -> float:
    """Return the share of the answers that are in what was said, whatever their case: RULER's string_match_all."""
    return sum(one.lower() in answer.lower() for one in wanted) / len(wanted)


def contains_any(answer: str, wanted: Sequence[str]) -> float:
    """Return whether one of the answers is in what was said, whatever its case: RULER's string_match_part."""
    return float(any(one.lower() in answer.lower() for one in wanted))


def share_of_numbers(answer: str, wanted: Sequence[str]) -> float:
    """Return the share of the numbers said that are the one wanted: LongBench's score of counts and of paragraphs."""
    numbers = re.findall(r"\d+", answer)
    return max(numbers.count(one) for one in wanted) / len(numbers) if numbers else 0.0


def rouge(answer: str, wanted: Sequence[str]) -> float:
    """Return the F score of ROUGE-L, the best over the answers that count.

    Raises:
        MissingPackageError: rouge-score is not installed.
    """
    scorer = rouge_scorer()
    return max(float(scorer.score(one, answer)["rougeL"].fmeasure) for one in wanted)


SCORERS: dict[str, Callable[[str, Sequence[str]], float] | None] = {
    SQUAD: None,
    "all": contains_all,
    "any": contains_any,
    "numbers": share_of_numbers,
    "rouge": rouge,
}
"""By name; None is SQuAD's, which has several fields."""


def require_scorers(names: Iterable[str]) -> None:
    """Look for the packages of scorers.

    Raises:
        MissingPackageError: one is not installed.
    """
    for name, needed in ((SQUAD, squad_metric), ("rouge", rouge_scorer)):
        if name in names:
            needed()


@cache
def rouge_scorer() -> Any:
    """Return what computes ROUGE-L, words as they are written, in any script; of scripts without spaces each character.

    Raises:
        MissingPackageError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import Tokenizer
    except ImportError as error:
        raise MissingPackageError(
            'rouge-score is needed to score summaries; pip install "transformerfam[answers]"'
        ) from error

    class Words(Tokenizer):
        """rouge-score's own knows the letters a to z alone."""

        def tokenize(self, text: str) -> list[str]:
            return ROUGE_WORD.findall(text.lower())

    return RougeScorer(["rougeL"], tokenizer=Words())


def squad_metric() -> Any:
    """Return torchmetrics' SQuAD metric.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        from torchmetrics.functional.text import squad
    except ImportError as error:
        raise MissingPackageError(
            'torchmetrics is needed to score answers; pip install "transformerfam[answers]"'
        ) from error
    return squad


def _contains(answer: str, wanted: str) -> bool:
    """Say whether an answer holds another as whole words, whatever their case and the punctuation around them."""
    here, there = _words(answer), _words(wanted)
    return bool(there) and any(here[idx : idx + len(there)] == there for idx in range(len(here) - len(there) + 1))


def _words(text: str) -> list[str]:
    return [word for part in text.casefold().split() if (word := part.strip(PUNCTUATION))]
