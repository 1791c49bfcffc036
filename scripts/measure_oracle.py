"""Measure how much the rows of a memory can hold and a frozen model can read: fit them, and nothing else, by gradient.

    fam data fetch questions --folder runs/data
    python scripts/measure_oracle.py --questions runs/data/questions/test/squad.jsonl --output runs/oracle.jsonl
    python scripts/measure_oracle.py --output runs/oracle.jsonl --table

For every passage (a paragraph of an article), number of rows and choice of layers, the rows begin as the keys and
values of tokens of the passage, evenly spaced, and are fitted to say the passage after a cue, or to expect what the
model with the passage in sight expects in lessons that it makes of it itself (`transformerfam.study.lessons`). Then:
how much of the passage is said right, the F1 of its questions, and the loss of the next paragraph. Other systems are
controls: `full_context` has the passage in sight, `question_alone` nothing, `fam_start` the rows before they are
fitted, `fam_memory_initial` those of a new reading. The same command continues a run that was stopped.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from transformerfam import FamConfig, convert
from transformerfam.decoder.positions import first_position
from transformerfam.fam.layer import joined_slots
from transformerfam.fam.state import FamState
from transformerfam.reports.rows import RowFile, read_rows
from transformerfam.study.document import Pieces
from transformerfam.study.lessons import CLOSED, Lesson, LessonMaker, divergence
from transformerfam.study.rows import LearnedRows
from transformerfam.tasks.answer_scores import score_answer
from transformerfam.tasks.answers_evaluation import TEMPLATE
from transformerfam.tasks.provenance import provenance, weights_of
from transformerfam.tasks.ragged import greedy_tokens
from transformerfam.tasks.text import encode
from transformerfam.weights.models import load_base

TASK = "oracle"
CUE = "\n\nThe same text again, word for word:\n"
SHAPES = "16:all,64:all,256:all,64:upper"
UPPER = "upper"
"""The upper half of the layers."""
FITS = {"passage": (12, 0.1), "lessons": (28, 0.02)}
"""What rows are fitted to, each by itself: steps and learning rate."""
PLAIN = ("full_context", "question_alone")
LESSONS: dict[str, list[Lesson]] = {}
"""By passage."""
MAX_QUESTIONS, ANSWER_TOKENS, NEXT_TOKENS, NUM_BEGUN = 4, 12, 96, 8
MEASURES = ("said_accuracy", "said_greedy", "f1", "answer_loss", "next_loss")
NUM_LESSONS, LESSON_PIECES, LESSON_TOKENS = 7, 2, 32


class Passage(NamedTuple):
    """A paragraph with its questions, and the one that follows it."""

    name: str
    text: str
    questions: list[tuple[str, list[str]]]
    next_text: str


def passages(path: Path, tokenizer: Any, shortest: int, longest: int) -> Iterator[Passage]:
    """Yield paragraphs of a length, one of each article, then another one of each, and so on."""
    articles: dict[str, dict[int, tuple[str, list[Any]]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        title, _, number = values["passages"][0]["title"].rpartition(" ")
        paragraph = articles.setdefault(title, {}).setdefault(int(number), (values["passages"][0]["text"], []))
        if values["answers"]:
            paragraph[1].append((values["question"], values["answers"]))
    fitting = [
        [
            Passage(f"{title} {number}", *paragraphs[number], paragraphs[number + 1][0])
            for number in sorted(paragraphs)
            if number + 1 in paragraphs and shortest <= len(encode(tokenizer, paragraphs[number][0])) <= longest
        ]
        for title, paragraphs in articles.items()
    ]
    for one_of_each in itertools.zip_longest(*fitting):
        yield from (passage for passage in one_of_each if passage is not None)


class Oracle:
    """A model with so many rows in all layers, or in the upper half of them."""

    def __init__(self, fam_length: int, layers: str) -> None:
        self.model, self.tokenizer = load_base("smollm2")
        num_layers, self.layers = self.model.config.num_hidden_layers, layers
        upper = tuple(range(num_layers // 2, num_layers)) if layers == UPPER else None
        shape = {"block_size": 512, "num_memory_segments": 0, "fam_layers": upper}
        convert(self.model, FamConfig.preset("gated", **shape, fam_length=fam_length)).requires_grad_(False)

    def plain(self, ids: list[int] | None = None) -> FamState:
        """Return a reading without rows, of a passage or of nothing."""
        state = self.model.init_state()
        state.config = state.config.replace(fam_key_bias=CLOSED)
        return self.model.read(torch.tensor([ids]), state) if ids else state

    def start(self, ids: list[int]) -> torch.Tensor:
        """Return keys and values of tokens of a passage as rows `(L, 1, F, W)`, all as far away as its end."""
        length, state = self.model.fam_config.fam_length, self.plain(ids)
        places = torch.linspace(0, len(ids) - 1, length).round().long()
        distance = -first_position(state.config) - len(ids)
        layers = []
        for layer in state.layers:
            slots = layer.sections.block + places
            layers.append(
                joined_slots(*layer.turner.turn(layer.keys[:, :, slots], layer.values[:, :, slots], distance))
            )
        return torch.stack(layers)

    def says(self, ids: list[int]) -> Lesson:
        """Return the lesson to say a passage."""
        cue = encode(self.tokenizer, CUE)
        return Lesson("repeat", torch.tensor([cue + ids]), len(cue), torch.ones(1, len(ids), dtype=torch.bool), None)

    def fit(self, rows: LearnedRows, lessons: list[Lesson], num_steps: int, lr: float) -> dict[str, Any]:
        """Fit rows to lessons in turn, and return what the row says of it."""
        optimizer, begun, losses = torch.optim.Adam(rows.parameters(), betas=(0.9, 0.99)), time.process_time(), []
        for step in range(num_steps):
            optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 5) * (1 - 0.9 * step / num_steps)
            lesson = lessons[step % len(lessons)]
            optimizer.zero_grad()
            loss = divergence(self.model, rows.state(len(lesson.ids_BT)), lesson)
            loss.backward()
            optimizer.step()
            losses.append(round(loss.item(), 4))
        seconds = round(time.process_time() - begun, 1)
        return {"steps": num_steps, "lr": lr, "fit_losses": losses, "cpu_seconds": seconds}

    @torch.no_grad()
    def measure(self, begin: Callable[[], FamState], passage: Passage, said: Lesson) -> dict[str, Any]:
        """Return what a reading says of a passage, answers about it, and expects after it."""
        ids = said.ids_BT[0, said.num_prompt_tokens :]
        logits = self.model(input_ids=said.ids_BT[:, :-1], past_key_values=begin()).logits[0, -len(ids) :]
        accuracy = (logits.argmax(-1) == ids).float().mean().item()
        following = encode(self.tokenizer, "\n\n" + passage.next_text)[: NEXT_TOKENS + 1]
        scores, losses = [], []
        for question, answers in passage.questions[:MAX_QUESTIONS]:
            asked = encode(self.tokenizer, TEMPLATE.replace("{question}", question))
            said_BT = greedy_tokens(self.model, torch.tensor([asked]), begin(), ANSWER_TOKENS)
            answer = self.tokenizer.decode(said_BT[0]).strip().partition("\n")[0].strip()
            scores.append(score_answer(answer, answers)["f1"])
            losses.append(self.loss_of(asked, encode(self.tokenizer, f" {answers[0]}"), begin()))
        return {
            "said_loss": torch.nn.functional.cross_entropy(logits, ids).item(),
            "said_accuracy": accuracy,
            "said_greedy": self.said_greedy(begin(), said) if accuracy > 0.9 else None,
            "f1": sum(scores) / len(scores),
            "answer_loss": sum(losses) / len(losses),
            "num_questions": len(scores),
            "next_loss": self.loss_of(following[:1], following[1:], begin()),
        }

    @torch.no_grad()
    def loss_of(self, before: list[int], ids: list[int], state: FamState) -> float:
        """Return the loss of tokens after others, in nats a token."""
        read = torch.tensor([before + ids[:-1]])
        logits = self.model(input_ids=read, past_key_values=state, logits_to_keep=len(ids)).logits[0]
        return torch.nn.functional.cross_entropy(logits, torch.tensor(ids)).item()

    @torch.no_grad()
    def said_greedy(self, state: FamState, said: Lesson) -> float:
        """Return the share of a passage, from its ninth token on, that greedy decoding says before it errs."""
        begun = said.num_prompt_tokens + NUM_BEGUN
        wanted = said.ids_BT[0, begun:]
        wrong = (greedy_tokens(self.model, said.ids_BT[:, :begun], state, len(wanted))[0] != wanted).nonzero()
        return int(wrong[0]) / len(wanted) if len(wrong) else 1.0

    def rows_of(
        self, passage: Passage, options: argparse.Namespace, has: set[tuple[Any, ...]]
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows of a passage that are not there yet."""
        ids, length = encode(self.tokenizer, passage.text), self.model.fam_config.fam_length
        said, lessons = self.says(ids), LESSONS.get(passage.name, [])

        def row(system: str, begin: Callable[[], FamState], fitted_to: str = "", **more: Any) -> dict[str, Any]:
            shape = ("", "") if system in PLAIN else (length, self.layers)
            fields = {"passage": passage.name, "passage_tokens": len(ids), "fitted_to": fitted_to}
            asked = {"task": TASK, "system": system, "model": "smollm2", "seed": 0, **fields}
            asked |= dict(zip(("fam_length", "layers"), shape, strict=True))
            return asked | self.measure(begin, passage, said) | more | weights_of(self.model) | provenance()

        for system, read in zip(PLAIN, (ids, None), strict=True):
            if (passage.name, system, "", "", "") not in has:
                yield row(system, self.plain(read).fork)
        with torch.no_grad():
            fresh, start = self.model.init_state(), self.start(ids)
        for system, fam in (("fam_memory_initial", None), ("fam_start", start)):
            if (system == "fam_start" or self.layers == "all") and (
                passage.name,
                system,
                length,
                self.layers,
                "",
            ) not in has:
                yield row(system, LearnedRows(fresh, fam).state)
        for fitted_to, (num_steps, lr) in FITS.items():
            if (passage.name, "fam_fitted", length, self.layers, fitted_to) in has:
                continue
            if fitted_to == "lessons" and not lessons:
                lessons = LESSONS[passage.name] = self.lessons(ids)
            rows = LearnedRows(fresh, start)
            fit = self.fit(rows, lessons if fitted_to == "lessons" else [said], num_steps, lr)
            yield row("fam_fitted", rows.state, fitted_to, **fit)

    def lessons(self, ids: list[int]) -> list[Lesson]:
        """Return what the model makes of a passage in sight; the same whatever the rows of the model."""
        made = LessonMaker(
            self.model,
            self.tokenizer,
            Pieces(torch.tensor(ids), len(ids)),
            batch_size=LESSON_PIECES,
            answer_tokens=LESSON_TOKENS,
            hides_memory=True,
            kinds=("what", "facts", "who", "continue", "when", "summary", "how many"),
        )
        return [made.lesson(number) for number in range(NUM_LESSONS)]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the means over passages as a Markdown table, those passages alone that all lines have."""
    names = ("system", "fam_length", "layers", "fitted_to")
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), {})[row["passage"]] = row
    shared = set.intersection(*(set(group) for group in groups.values()))
    tokens = [row["passage_tokens"] for row in next(iter(groups.values())).values() if row["passage"] in shared]
    lines = [
        f"{len(shared)} passages of {min(tokens)} to {max(tokens)} tokens",
        "| system | rows | layers | fitted to | said right | said greedily | F1 | answer loss | next loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for group, by_passage in groups.items():
        cells = [str(part) or "-" for part in group]
        for name in MEASURES:
            values = [row[name] for passage, row in by_passage.items() if passage in shared]
            given = [0.0 if value is None else value for value in values]
            cells.append("-" if all(value is None for value in values) else f"{sum(given) / len(given):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, help="JSON lines of fam data fetch questions")
    parser.add_argument("--output", required=True, help="JSON lines")
    parser.add_argument("--passages", type=int, default=20)
    parser.add_argument("--shapes", default=SHAPES, help="rows and layers, all or upper")
    parser.add_argument("--min-tokens", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--table", action="store_true", help="print the table of the rows that are there")
    options = parser.parse_args()
    if options.table:
        print(table(read_rows([options.output])))
        return
    torch.set_flush_denormal(True)
    shapes = [shape.partition(":") for shape in options.shapes.split(",")]
    oracles = [Oracle(int(length), layers) for length, _, layers in shapes]
    with RowFile(options.output) as file:
        found = passages(options.questions, oracles[0].tokenizer, options.min_tokens, options.max_tokens)
        for number, passage in enumerate(itertools.islice(found, options.passages), start=1):
            for oracle in oracles:
                names = ("passage", "system", "fam_length", "layers", "fitted_to")
                has = {tuple(row[name] for name in names) for row in file.rows}
                for row in oracle.rows_of(passage, options, has):
                    file.append(row)
                    shown = " ".join(f"{name} {row[name]:.3f}" for name in MEASURES if row[name] is not None)
                    print(number, *(row[name] for name in names), shown, row.get("cpu_seconds", ""), flush=True)


if __name__ == "__main__":
    main()
