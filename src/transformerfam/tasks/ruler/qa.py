"""RULER's questions on documents, those that answer them among others."""

import random
from functools import cache

from transformerfam.tasks.made_questions import MadeQuestion, Write
from transformerfam.tasks.ruler.parts import Documents, Parts

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
TEXT = INSTRUCTION + "\n\nThe following are given documents.\n\n{context}"
PROMPT = "\n\n" + INSTRUCTION + "\n\nQuestion: {query} Answer:"
DOCUMENT = "Document {number}:\n{document}"


class Questions:
    """The task of one set of documents.

    Args:
        name: "squad" or "hotpotqa".
        parts: has them.
    """

    def __init__(self, name: str, parts: Parts) -> None:
        self._documents = cache(lambda: parts.documents(name))

    def prepare(self, num_tokens: int, place: tuple[int, int], draw: random.Random) -> tuple[Write, int, int | None]:
        """Draw a question, and the order in which documents join those that it needs; as `Prepare`."""
        known: Documents = self._documents()
        number, num_items = place
        begin, end = (len(known.questions) * share // num_items for share in (number, number + 1))
        question, answers, needed, related = known.questions[draw.randrange(begin, max(end, begin + 1))]
        others = [idx for idx in range(len(known.documents)) if idx not in {*needed, *related}]
        order = [*needed, *draw.sample(related, len(related)), *draw.sample(others, len(others))]
        seed = draw.random()

        def write(size: int) -> MadeQuestion:
            taken = [known.documents[idx] for idx in order[:size]]
            random.Random(f"{seed}/{size}").shuffle(taken)
            return worded(taken, question, answers)

        return write, len(needed), len(order)


def worded(documents: list[str], question: str, answers: tuple[str, ...]) -> MadeQuestion:
    """Return an item in the published words."""
    listed = (DOCUMENT.format(number=number, document=document) for number, document in enumerate(documents, 1))
    return MadeQuestion(
        text=TEXT.format(context="\n\n".join(listed)),
        prompt=PROMPT.format(query=question),
        question=question,
        answers=answers,
        scorer="any",
        max_new_tokens=32,
    )
