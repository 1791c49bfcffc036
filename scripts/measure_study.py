"""Measure what a study adds to a reading: the questions of one article, asked after so many minutes of study.

    fam data fetch questions --folder runs/data
    fam convert smollm2 runs/gated64 --set block_size=512 --set fam_length=64 --set num_memory_segments=0
    python scripts/measure_study.py --model runs/gated64 --hide-memory --minutes 0,5,20 \
        --questions runs/data/questions/test/squad.jsonl --article Fresno,_California --output runs/study.jsonl

The article is the text. Controls: `question_alone`, and `full_context` with all of the article in sight. The same
command continues a run that was stopped: the study is beside the rows, its minutes count over all runs.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from transformerfam.cli.loading import load_system
from transformerfam.fam.state import FamState
from transformerfam.reports.rows import RowFile
from transformerfam.study.begin import begin_study
from transformerfam.study.checkpoint import StudyFiles
from transformerfam.study.lessons import CLOSED
from transformerfam.study.options import StudyOptions
from transformerfam.tasks.answer_scores import score_answer
from transformerfam.tasks.answers_evaluation import FULL_CONTEXT, QUESTION_ALONE, TEMPLATE
from transformerfam.tasks.provenance import provenance, weights_of
from transformerfam.tasks.ragged import greedy_tokens
from transformerfam.tasks.text import encode
from transformerfam.weights.models import load_model

ANSWER_TOKENS = 16
Question = tuple[str, list[str]]


def article(path: Path, title: str, count: int) -> tuple[str, list[Question]]:
    """Return the text of an article, and so many of its questions from all over it."""
    paragraphs: dict[int, tuple[str, list[Question]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        name, _, number = values["passages"][0]["title"].rpartition(" ")
        if name == title:
            paragraph = paragraphs.setdefault(int(number), (values["passages"][0]["text"], []))
            if values["answers"]:
                paragraph[1].append((values["question"], values["answers"]))
    found = [question for number in sorted(paragraphs) for question in paragraphs[number][1]]
    text = "\n\n".join(paragraphs[number][0] for number in sorted(paragraphs))
    return text, found[:: max(1, len(found) // count)][:count]


@torch.no_grad()
def scores(model: Any, tokenizer: Any, begin: Callable[[], Any], questions: list[Question]) -> dict[str, Any]:
    """Return the F1 of greedy answers and the loss of the right ones, in nats a token."""
    f1, losses = [], []
    for question, answers in questions:
        asked = encode(tokenizer, TEMPLATE.replace("{question}", question))
        said_BT = greedy_tokens(model, torch.tensor([asked]), begin(), ANSWER_TOKENS)
        f1.append(score_answer(tokenizer.decode(said_BT[0]).strip().partition("\n")[0].strip(), answers)["f1"])
        right = encode(tokenizer, f" {answers[0]}")
        read = torch.tensor([asked + right[:-1]])
        logits = model(input_ids=read, past_key_values=begin(), logits_to_keep=len(right)).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(right)).item())
    return {"f1": sum(f1) / len(f1), "answer_loss": sum(losses) / len(losses), "num_questions": len(f1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--article", required=True)
    parser.add_argument("--num-questions", type=int, default=32)
    parser.add_argument("--minutes", default="0,5,20,60")
    parser.add_argument("--hide-memory", action="store_true")
    parser.add_argument("--lr", type=float, default=StudyOptions.lr)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    text, questions = article(options.questions, options.article, options.num_questions)
    model, tokenizer = load_model(options.model)
    path = options.output.with_suffix(".txt")
    path.write_text(text, encoding="utf-8")
    files = StudyFiles(options.output.with_suffix(".fam.safetensors"))
    with RowFile(options.output) as file:
        has = {(row["system"], row["minutes"]) for row in file.rows}

        def add(system: str, minutes: float, begin: Callable[[], Any], asked: Any = model, **more: Any) -> None:
            if (system, minutes) in has:
                return
            fields = {"task": "study", "system": system, "model": options.model, "seed": 0, "article": options.article}
            fields |= {"context_tokens": len(encode(tokenizer, text)), "minutes": minutes}
            measured = scores(asked, tokenizer, begin, questions)
            file.append(fields | measured | more | weights_of(asked) | provenance())
            print(system, minutes, {name: round(value, 3) for name, value in measured.items()}, more, flush=True)

        nothing = model.init_state()
        nothing.config = nothing.config.replace(fam_key_bias=CLOSED)
        add(QUESTION_ALONE, 0.0, nothing.fork)
        if (FULL_CONTEXT, 0.0) not in has:
            plain, _ = load_system("smollm2", FULL_CONTEXT, None, "cpu", None)
            whole = plain.read(torch.tensor(encode(tokenizer, text)))
            add(FULL_CONTEXT, 0.0, whole.fork, plain, state_bytes=whole.num_bytes)
            del plain, whole
        study_options = StudyOptions(hide_memory=options.hide_memory, lr=options.lr)
        resume = files.reading.exists()
        study = begin_study(model, tokenizer, str(path), study_options, files, resume=resume)
        for minutes in map(float, options.minutes.split(",")):
            result = study.run(max_seconds=minutes * 60)
            state: FamState = result.state
            done = {"steps": result.progress.step, "best_step": result.progress.best_step}
            losses = {"held_out_start": result.progress.start_loss, "held_out_best": result.progress.best_loss}
            add(
                "fam" if minutes == 0 else "fam_studied",
                minutes,
                state.fork,
                **done,
                **losses,
                state_bytes=state.num_bytes,
            )
            print(result.message, flush=True)
            state.save(files.save)


if __name__ == "__main__":
    main()
