"""The paper's training on instructions: weights, packing, the repeated segment, and transformers' own loop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_recipes import small_values
from transformers import PreTrainedTokenizerFast, TrainingArguments
from transformers_loop import MemoryTrainer

from transformerfam.errors import RecipeError
from transformerfam.tasks.text import encode
from transformerfam.training.data.instructions import PackedInstructions, read_instructions
from transformerfam.training.recipe.toml import build_recipe
from transformerfam.training.tiny import build_tiny_tokenizer
from transformerfam.training.trainer import Trainer

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}What is {{ m['content'] }}? {% else %}{{ m['content'] }}. "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{% endif %}"
)
LINES: list[dict[str, Any]] = [
    {"prompt": "What is the pass key? The pass key is ", "answer": "12345"},
    {"text": "The grass is green. The sky is blue."},
    {"prompt": "The sun is ", "answer": "yellow. Here we go."},
]


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES * 3))
    return (str(tmp_path / "lines.jsonl"),)


def make_recipe(files: tuple[str, ...], **sections: Any) -> Any:
    instructions = {"files": list(files), "length": 90, "repeat_tokens": 20} | sections.pop("instructions", {})
    values = small_values(instructions=instructions)
    del values["schedule"]["curriculum"]
    values["optimizer"] = {"warmup_steps": 1, "weight_decay": 0.0, "betas": [0.9, 0.99]}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return build_recipe(values)


def test_prompts_weigh_nothing_and_answers_one(files: tuple[str, ...]) -> None:
    """Catches prompts that are trained, and answers that are not."""
    tokenizer = build_tiny_tokenizer()
    recipe = make_recipe(files)
    first, text, last = read_instructions(tokenizer, recipe.instructions)[:3]
    eos = tokenizer.eos_token or ""
    for piece, line in ((first, LINES[0]), (last, LINES[2])):
        assert piece.ids == encode(tokenizer, line["prompt"] + line["answer"] + eos)
        answer = [token for token, weight in zip(piece.ids, piece.weights, strict=True) if weight == 1]
        assert tokenizer.decode(answer).strip() == line["answer"] + eos
        assert set(piece.weights) == {0.0, 1.0}
    assert set(text.weights) == {1.0}


def test_chat_template_writes_conversations(tmp_path: Path) -> None:
    """Catches roles that swap weights, and text of a template that is lost between two messages."""
    tokenizer: PreTrainedTokenizerFast = build_tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    messages = [
        {"role": "user", "content": "the pass key"},
        {"role": "assistant", "content": "12345"},
        {"role": "user", "content": "blue"},
        {"role": "assistant", "content": "The sky is blue"},
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"prompt": "blue", "answer": "The sky"}))
    recipe = make_recipe((str(path),))
    piece, pair = read_instructions(tokenizer, recipe.instructions)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert piece.ids == encode(tokenizer, whole)
    answers = [token for token, weight in zip(piece.ids, piece.weights, strict=True) if weight]
    assert tokenizer.decode(answers).split() == ["12345.", "The", "sky", "is", "blue."]
    assert 0 < sum(pair.weights) < len(pair.ids)


def test_sequences_are_packed_and_end_with_a_repeated_segment(files: tuple[str, ...]) -> None:
    """Catches tokens that are lost between two sequences, and a repeated segment that is nowhere before."""
    tokenizer = build_tiny_tokenizer()
    packed = PackedInstructions(make_recipe(files, instructions={"length": 60, "repeat_tokens": 10}), tokenizer)
    stream = []
    for number in range(packed.per_epoch):
        ids, weights = packed.sequence(number)
        assert len(ids) == len(weights) == 60
        body, repeated = ids[: packed.num_packed].tolist(), ids[-10:].tolist()
        assert any(body[i : i + 10] == repeated for i in range(len(body)))
        assert torch.allclose(weights[-10:], torch.tensor(0.1))
        assert ids[packed.num_packed : -10].tolist() == packed.announcement
        assert weights[packed.num_packed : -10].sum() == 0
        stream += body
    whole = {tuple(piece.ids) for piece in packed.pieces}
    found = {ids for ids in whole if any(tuple(stream[i : i + len(ids)]) == ids for i in range(len(stream)))}
    assert len(found) >= len(whole) - 1  # the last of the epoch may be cut
    again = PackedInstructions(make_recipe(files, instructions={"length": 60, "repeat_tokens": 10}), tokenizer)
    for number in (5, 0, 3):
        assert torch.equal(again.sequence(number)[0], packed.sequence(number)[0])


def test_text_files_and_folders_are_read_whole(tmp_path: Path) -> None:
    """Catches a text that is read line by line, and files of a folder that are left out."""
    tokenizer, folder = build_tiny_tokenizer(), tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    texts = {"b.txt": "The sky is blue.\n\nThe grass is green.\n", "deep/a.txt": "Here we go.", "deep/c.txt": " \n"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "notes.md").write_text("no text of ours")
    pieces = read_instructions(tokenizer, make_recipe((str(folder),)).instructions)
    eos = tokenizer.eos_token or ""
    assert [piece.ids for piece in pieces] == [encode(tokenizer, texts[name] + eos) for name in ("b.txt", "deep/a.txt")]
    assert {weight for piece in pieces for weight in piece.weights} == {1.0}
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"'.*empty' holds no file, required is at least one UTF-8 text"):
        read_instructions(tokenizer, make_recipe((str(tmp_path / "empty"),)).instructions)
    (tmp_path / "empty" / "a.md").write_text("no text of ours")
    with pytest.raises(RecipeError, match=r"'.*empty' holds no .txt file; name another folder"):
        read_instructions(tokenizer, make_recipe((str(tmp_path / "empty"),)).instructions)


def test_texts_of_folders_are_read_once_and_as_they_are(tmp_path: Path) -> None:
    """Catches hidden files and byte order marks that are trained on, texts that count twice, and links left out."""
    tokenizer, folder, other = build_tiny_tokenizer(), tmp_path / "texts", tmp_path / "other"
    (folder / "dir.txt").mkdir(parents=True)
    other.mkdir()
    (other / "c.txt").write_text("The sky is blue.")
    (folder / "link").symlink_to(other)
    (folder / "a.TXT").write_bytes("\ufeffThe grass is green.".encode())
    (folder / ".hidden.txt").write_text("The sun is yellow.")
    pieces = read_instructions(tokenizer, make_recipe((str(folder),)).instructions)
    texts = ("The grass is green.", "The sky is blue.")
    assert [piece.ids for piece in pieces] == [encode(tokenizer, text + tokenizer.eos_token) for text in texts]
    with pytest.raises(RecipeError, match=r"c.txt is named 2 times, required is once"):
        read_instructions(tokenizer, make_recipe((str(folder), str(other))).instructions)
    with pytest.raises(RecipeError, match="instructions.files: the path is empty"):
        read_instructions(tokenizer, make_recipe(("",)).instructions)
    lines = tmp_path / "lines.jsonl"
    lines.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "Here\u2028we go."}, ensure_ascii=False).encode())
    assert len(read_instructions(tokenizer, make_recipe((str(lines),)).instructions)) == 1


def test_mixed_sequences_are_those_of_the_epoch_in_another_order(files: tuple[str, ...]) -> None:
    """Catches sequences that are left out or read twice, and the same order in every epoch."""
    section = {"length": 16, "repeat_tokens": 0}
    plain, mixed = (
        PackedInstructions(make_recipe(files, instructions=section | {"mix_sequences": mix}), build_tiny_tokenizer())
        for mix in (False, True)
    )

    def epoch(packed: PackedInstructions, number: int) -> list[tuple[int, ...]]:
        numbers = range(number * packed.per_epoch, (number + 1) * packed.per_epoch)
        return [tuple(packed.sequence(number)[0].tolist()) for number in numbers]

    assert plain.per_epoch > 5
    for number in range(2):
        assert sorted(epoch(plain, number)) == sorted(epoch(mixed, number))
        assert epoch(plain, number) != epoch(mixed, number)
    orders = [[epoch(plain, number).index(ids) for ids in epoch(mixed, number)] for number in range(2)]
    assert orders[0] != orders[1]


def test_batch_predicts_every_weighed_token(files: tuple[str, ...]) -> None:
    """Catches weights at the token itself and not where it is predicted."""
    packed = PackedInstructions(make_recipe(files), build_tiny_tokenizer())
    batch = packed.batch(1)
    ids, _ = packed.sequence(3)
    assert torch.equal(batch.input_ids_BT[0], ids)
    assert torch.equal(batch.labels_BT[0, :-1], ids[1:])
    expected = torch.stack([packed.sequence(3 + row)[1][1:] for row in range(3)])
    torch.testing.assert_close(batch.weights_BT[:, :-1], expected / expected.sum())
    assert batch.weights_BT[:, -1].sum() == 0


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "passing": {"state_passing": {"probability": 0.8}},
    "offset": {"schedule": {"random_position_offset": True}, "fam": {"fam_position": "zero"}},
    "prefix": {"fam": {"fam_init": "prefix"}},
    "auxiliary losses": {"loss": {"diversity": 0.1, "reconstruction": 0.5}},
    "adafactor": {"optimizer": {"kind": "adafactor"}},
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("passing", "auxiliary losses") else pytest.param(name, marks=pytest.mark.slow)
        for name in OPTIONS
    ],
)
def test_loop_of_transformers_gives_the_same_losses(name: str, files: tuple[str, ...], tmp_path: Path) -> None:
    """Catches a batch, a loss, a passed state or an optimizer that differs between `fam train` and transformers."""
    recipe = make_recipe(files, **OPTIONS[name])
    Trainer(recipe, tmp_path / "own").run()
    own = [json.loads(line) for line in (tmp_path / "own" / "log.jsonl").read_text().splitlines()]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "transformers"),
        max_steps=recipe.schedule.steps,
        per_device_train_batch_size=recipe.schedule.batch_size,
        learning_rate=recipe.optimizer.lr,
        lr_scheduler_type="constant",
        adam_beta2=0.99,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        remove_unused_columns=False,
        optim="adafactor" if name == "adafactor" else "adamw_torch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = MemoryTrainer(recipe, arguments)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    num_compared = 1 if name == "adafactor" else 6  # theirs has no first moment
    expected = [row["loss"] for row in own]
    assert theirs[:num_compared] == pytest.approx(expected[:num_compared], rel=1e-4)
    assert expected[-1] < expected[0]
    if name == "passing":
        assert any(row["state_passed"] for row in own)


def test_loop_of_transformers_begins_with_the_same_weights(files: tuple[str, ...], tmp_path: Path) -> None:
    """Catches first weights of LoRA that are drawn from whatever the process has drawn before."""
    recipe = make_recipe(files, lora={"rank": 2})
    arguments = TrainingArguments(str(tmp_path / "theirs"), use_cpu=True, report_to=[], remove_unused_columns=False)
    torch.manual_seed(77)
    theirs = dict(MemoryTrainer(recipe, arguments).model.named_parameters())
    own = dict(Trainer(recipe, tmp_path / "own").model.named_parameters())
    assert any("lora_A" in name for name in own)
    assert all(torch.equal(theirs[name], parameter) for name, parameter in own.items())


def test_run_is_resumed_exactly_with_adafactor(files: tuple[str, ...], tmp_path: Path) -> None:
    """Catches moments of rows and columns that a checkpoint loses."""
    recipe = make_recipe(files, optimizer={"kind": "adafactor"}, state_passing={"probability": 0.5})
    Trainer(recipe, tmp_path / "whole").run()
    first = make_recipe(
        files, optimizer={"kind": "adafactor"}, state_passing={"probability": 0.5}, schedule={"max_seconds": 0.0}
    )
    Trainer(first, tmp_path / "halves").run()
    Trainer(recipe, tmp_path / "halves", resume=True).run()
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "halves")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_offset_is_zero_half_of_the_time_and_within_one_wavelength(files: tuple[str, ...], tmp_path: Path) -> None:
    from transformerfam.training.step.step import position_offset

    model = Trainer(make_recipe(files), tmp_path).model
    offsets = [position_offset(model, 0, step) for step in range(200)]
    assert 60 < offsets.count(0) < 140
    slowest = float(model.get_decoder().rotary_emb.inv_freq.min())
    assert min(offsets) >= 0
    assert 0.8 * 6.28 / slowest < max(offsets) <= 6.2832 / slowest


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "line 1: .*required is JSON with messages"),
        ('{"prompt": "a"}', "line 1: 'answer'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "has no chat template"),
        ("", "hold no token of a weight above 0"),
    ],
)
def test_bad_lines_are_refused(line: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(line)
    with pytest.raises(RecipeError, match=match):
        PackedInstructions(make_recipe((str(tmp_path / "bad.jsonl"),)), build_tiny_tokenizer())


def test_recipe_refuses_passkey_sections_beside_instructions(files: tuple[str, ...]) -> None:
    for section, match in (
        ({"schedule": {"stored_blocks": 2}}, "schedule.stored_blocks is given with instructions"),
        ({"instructions": {"length": 30}}, "instructions.length is 30, required is more than twice"),
        ({"loss": {"teacher": 1.0}, "model": {"base": "smollm2"}}, "loss.teacher, state_passing.ask_later"),
    ):
        with pytest.raises(RecipeError, match=match):
            make_recipe(files, **section)
    with pytest.raises(RecipeError, match="cannot read 'missing.jsonl'"):
        PackedInstructions(make_recipe(("missing.jsonl",)), build_tiny_tokenizer())
    values = small_values()
    del values["schedule"]["curriculum"]
    with pytest.raises(RecipeError, match="schedule.curriculum is empty"):
        build_recipe(values)
