"""Questions as tokens."""

import json

from transformerfam.tasks.question import Question


def test_question_is_read_back_from_json() -> None:
    """Catches questions that are restored as lists, and an earlier version's, which have no third part."""
    for question in (Question((1, 2), (3,)), Question((), (3,), (4, 5))):
        assert Question.of(*json.loads(json.dumps(question))) == question
    assert Question.of(*json.loads("[[1, 2], [3]]")) == Question((1, 2), (3,))
