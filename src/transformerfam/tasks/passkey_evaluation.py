"""Passkey retrieval measured: batch by batch of keys, without what was answered before."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformerfam.errors import TransformerFamError
from transformerfam.reports.telling import Telling
from transformerfam.tasks.filler import FillerStream
from transformerfam.tasks.passkey_questions import PasskeyQuestions, Question
from transformerfam.tasks.passkey_reading import PasskeyReading, window_of


@dataclass(kw_only=True)
class PasskeyEvaluation(PasskeyQuestions):
    """Evaluate passkeys at many filler lengths; the fields are those of `PasskeyQuestions`."""

    def rows(self, model: Any, tokenizer: Any) -> Iterator[dict[str, Any]]:
        """Read, evaluate, and yield one row per question as soon as it is answered.

        Args:
            model: a converted model.
            tokenizer: its tokenizer.
        """
        text = self.text(tokenizer)
        keys = self.keys
        own = keys[self.process[0] :: self.process[1]]
        window = window_of(model)
        if self.prefix_tokens == "uniform" and self.filler_lengths[0] <= window:
            raise TransformerFamError(
                f"a text of {self.filler_lengths[0]} tokens has no place for a key in front of the {window} tokens in "
                f"sight of the question; give --filler-tokens above {window}, or --prefix-tokens a number"
            )
        lengths = list(self.filler_lengths)
        readings = [[length] for length in lengths] if self.prefix_tokens == "uniform" else [lengths]
        missing = [key for key in own if any(self.systems_missing(key, n) for n in self.filler_lengths)]
        batches = [missing[start : start + self.batch_size] for start in range(0, len(missing), self.batch_size)]
        if len(batches) > 1 and len(batches[-1]) == 1 and self.swaps:
            batches[-2:] = [batches[-2][:-1], batches[-2][-1:] + batches[-1]]  # no text is read alone
        total = len(missing) * sum(group[-1] for group in readings)
        done = 0
        for batch in batches:
            for group in readings:
                indices = [keys.index(key) for key in batch]
                reading = PasskeyReading(self, model, text, batch, indices, group, (done, total))
                yield from reading.rows()
                done += len(batch) * group[-1]


def finished_questions(rows: Iterable[Mapping[str, Any]], options: PasskeyEvaluation) -> frozenset[Question]:
    """Return the questions that `rows` answered with the model, seed, filler and telling of `options`.

    Raises:
        TransformerFamError: some of them used another text under the filler's or the wording's name, or
            jitter and without it.
    """
    name = options.filler.name if isinstance(options.filler, FillerStream) else Path(options.filler).name
    wanted = (options.model_name, options.seed, name, options.telling)
    found = set()
    for row in rows:
        if row["task"] != "passkey" or (row["model"], row["seed"], row.get("filler"), Telling.of_row(row)) != wanted:
            continue
        there, here = row.get("questions"), options.questions["questions"]
        if there not in (None, here) and row["system"] in options.systems:
            raise TransformerFamError(
                f"the rows of {row['system']} of {options.model_name} answer other questions ({there} there, {here} "
                f"here): the text of the filler {name}, the wording {options.telling.wording} or the jitter was "
                "changed; write the new answers to another file"
            )
        found.add((row["system"], row["filler_tokens"], row["key"]))
    return frozenset(found)


def evaluate_passkey(model: Any, tokenizer: Any, **options: Any) -> Iterator[dict[str, Any]]:
    """Yield one row per passkey question; the options are the fields of `PasskeyEvaluation`.

    Args:
        model: a converted model.
        tokenizer: its tokenizer.
        options: see `PasskeyEvaluation`; `filler_lengths` and `num_keys` are required.

    Raises:
        TransformerFamError: an option is out of its range, or the filler is not UTF-8.

    Source: sections 3.2 and D.1.
    """
    return PasskeyEvaluation(**options).rows(model, tokenizer)
