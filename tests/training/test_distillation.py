"""Distillation from full attention: the trained model as its own teacher, attention's outputs, weights and lessons."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_instructions import make_recipe
from torch import nn
from training_recipes import small_recipe

from transformerfam.errors import CorruptFileError, RecipeError
from transformerfam.training.data.instructions import PackedInstructions
from transformerfam.training.setup import build_teacher, build_trainee
from transformerfam.training.step.step import run_step
from transformerfam.training.step.teacher import Lesson, ReadsText, Teacher
from transformerfam.training.tiny import build_tiny_model, build_tiny_tokenizer
from transformerfam.training.trainer import Trainer
from transformerfam.weights.models import load_base

TOKENIZER = build_tiny_tokenizer()
LORA = {"rank": 2, "targets": ["q_proj", "v_proj", "down_proj"]}
FAR = {"full_attention": True, "far_context": 2.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a plain random model whose attention is sharp, so that what is far away shows."""
    folder = tmp_path_factory.mktemp("base")
    model = build_tiny_model(small_recipe().model, len(TOKENIZER))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.05)
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(10.0)
        model.get_output_embeddings().weight.mul_(5.0)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text(tmp_path: Path) -> str:
    words = ("The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 12).split()
    (tmp_path / "text.txt").write_text(" ".join(words[(7 * n) % len(words)] for n in range(400)))
    return str(tmp_path / "text.txt")


def recipe_of(base: str, text: str, loss: dict[str, Any], **sections: Any) -> Any:
    instructions = {"length": 60, "repeat_tokens": 0} | sections.pop("instructions", {})
    sections = {"model": {"base": base}, "lora": LORA, "loss": loss} | sections
    return make_recipe((text,), instructions=instructions, **sections)


def step_of(recipe: Any, batch: Any = None) -> tuple[Any, Any, Any, Any]:
    """Return the model of a recipe, its teacher, a batch, and the output of a step on it."""
    model, tokenizer = build_trainee(recipe)
    teacher, attention = build_teacher(recipe, model, "cpu")
    batch = PackedInstructions(recipe, tokenizer).batch(0) if batch is None else batch
    lesson = None if teacher is None else teacher.read(batch)
    state = model.init_state(len(batch.keys))
    return model, teacher, batch, run_step(model, batch, state, recipe, None, lesson, 0, attention=attention)


def test_trained_model_is_its_own_teacher(base: str, text: str, tmp_path: Path) -> None:
    """Catches a second copy of the weights, and a teacher that learns with its pupil."""
    recipe = recipe_of(base, text, {"full_attention": True})
    trainer = Trainer(recipe, tmp_path / "run")
    assert trainer.teacher is not None
    assert trainer.teacher.model is trainer.model
    batch = trainer.sequences.batch(0)
    expected = Teacher(base, reads_text=ReadsText()).read(batch)
    weights = trainer.teacher.weights
    trainer.run()
    assert any(parameter.abs().sum() > 0 for name, parameter in trainer.model.named_parameters() if "lora_B" in name)
    found = trainer.teacher.read(batch)
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found.text_hidden_BTD, expected.text_hidden_BTD, atol=1e-6, rtol=1e-5)
    assert trainer.teacher.weights == weights
    of_all_weights = Trainer(
        make_recipe((text,), model={"base": base}, loss={"full_attention": True}), tmp_path / "all"
    )
    assert of_all_weights.teacher is not None
    assert of_all_weights.teacher.model is not of_all_weights.model


@torch.no_grad()
def outputs_of(base: str, ids: torch.Tensor, length: int) -> torch.Tensor:
    """Return attention's outputs `(L, B, T, D)` of a plain base that reads stretches of `length` by themselves."""
    model, _ = load_base(base)
    noted: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda _m, _a, output: noted.append(output[0]))
    parts = []
    for stretch in ids.split(length, dim=1):
        model(input_ids=stretch)
        parts.append(torch.stack(noted))
        noted.clear()
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_distance_of_attention_is_that_of_its_outputs(base: str, text: str, checkpoint_blocks: bool) -> None:
    """Catches outputs of other tokens, layers or rows, FAM rows among them, and a distance of the weights' scale."""
    fam = {"block_size": 16, "fam_length": 0, "num_memory_segments": 0, "fam_norm_bound": None}
    loss = {"full_attention": True, "attention_outputs": 1.0}
    section = {"sampled_tokens": 5}
    schedule = {"checkpoint_blocks": checkpoint_blocks}
    recipe = recipe_of(base, text, loss, fam=fam, instructions=section, schedule=schedule)
    _, _, batch, output = step_of(recipe)
    full, own = (outputs_of(base, batch.input_ids_BT, length) for length in (60, 16))
    weights = batch.weights_BT
    scale = full.pow(2).sum(-1)[:, weights > 0].mean(-1)
    expected = ((own - full).pow(2).sum(-1) * weights).sum((1, 2)) / scale
    torch.testing.assert_close(output.attention_distance, expected.mean(), atol=1e-6, rtol=1e-4)
    assert output.attention_distance > 1e-3
    without = step_of(recipe_of(base, text, {"full_attention": True}, fam=fam, instructions=section))[-1]
    torch.testing.assert_close(output.loss, without.loss + output.attention_distance, atol=1e-6, rtol=1e-5)
    in_sight = step_of(recipe_of(base, text, loss, fam=fam | {"block_size": 64}))[-1]
    assert in_sight.attention_distance < 1e-8


def test_distance_of_attention_teaches_to_write(base: str, text: str) -> None:
    """Catches a distance whose gradient does not come to the block that the memory was written from."""
    loss = {"full_attention": True, "attention_outputs": 1.0}
    recipe = recipe_of(base, text, loss, fam={"block_size": 16, "fam_length": 4})
    model, tokenizer = build_trainee(recipe)
    teacher, attention = build_teacher(recipe, model, "cpu")
    assert teacher is not None
    batch = PackedInstructions(recipe, tokenizer).batch(0)
    batch.weights_BT[:, :48] = 0.0
    state = model.init_state(3, fam=torch.randn(2, 3, 4, 32, generator=torch.Generator().manual_seed(0)))
    fams = [layer.fam.requires_grad_() for layer in state.layers]
    output = run_step(model, batch, state, recipe, None, teacher.read(batch), 0, attention=attention)
    (output.loss - output.loss.detach()).backward()
    assert all(fam.grad is not None and fam.grad.abs().sum() > 0 for fam in fams)


def test_training_comes_nearer_to_full_attention(base: str, text: str, tmp_path: Path) -> None:
    """Catches a weight of the recipe that reaches no loss, or has the wrong sign."""
    loss = {"full_attention": True, "attention_outputs": 10.0}
    schedule = {"steps": 12, "batch_size": 2, "block_sizes": [16, 24]}
    recipe = recipe_of(base, text, loss, schedule=schedule, optimizer={"lr": 5e-3, "warmup_steps": 2})
    rows: list[float] = []
    Trainer(recipe, tmp_path).run(lambda _, row: rows.append(row["attention_distance"]))
    assert sum(rows[-4:]) < 0.8 * sum(rows[:4])


def test_tokens_weigh_by_what_far_context_saves(base: str, text: str) -> None:
    """Catches a gain of another token, of a loss that grows, and stretches that see what precedes them."""
    recipe = recipe_of(base, text, FAR, fam={"block_size": 8, "num_memory_segments": 1})
    _, teacher, batch, _ = step_of(recipe)
    lesson = teacher.read(batch)
    model, _ = load_base(base)
    ids, labels = batch.input_ids_BT, batch.labels_BT
    with torch.no_grad():
        full = model(input_ids=ids).logits
        near = torch.cat([model(input_ids=stretch).logits for stretch in ids.split(16, dim=1)], dim=1)
    losses = [nn.functional.cross_entropy(x.transpose(1, 2), labels, reduction="none") for x in (near, full)]
    expected = 1 + 2.0 * (losses[0] - losses[1]).clamp(min=0) * (batch.weights_BT > 0)
    torch.testing.assert_close(lesson.emphasis_BT, expected, atol=1e-4, rtol=1e-4)
    assert (expected[:, :16] == 1).all()
    assert expected.max() > 1.1
    with torch.no_grad():
        losses = []
        for weights_BT, taught in ((batch.weights_BT, lesson), (batch.weights_BT * expected, plain_lesson(lesson))):
            model, _ = build_trainee(recipe)
            weighed = dataclasses.replace(batch, weights_BT=weights_BT)
            losses.append(run_step(model, weighed, model.init_state(3), recipe, None, taught, 0).loss)
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)


def plain_lesson(lesson: Lesson) -> Lesson:
    return dataclasses.replace(lesson, emphasis_BT=None)


@pytest.mark.parametrize("full_attention", [False, True])
def test_logits_are_made_slice_by_slice(
    base: str, text: str, full_attention: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches all logits of a step at once, and slices whose loss or gradient differs from theirs."""
    recipe = recipe_of(base, text, FAR if full_attention else {})
    found, most = [], []
    for most_logits in (1 << 26, 5 * len(TOKENIZER)):
        monkeypatch.setattr("transformerfam.training.step.teacher.MOST_LOGITS", most_logits)
        made: list[int] = []
        torch.manual_seed(0)
        with nn.modules.module.register_module_forward_hook(
            lambda module, _, output, made=made: (
                made.append(output.shape[:-1].numel()) if getattr(module, "out_features", 0) == len(TOKENIZER) else None
            )
        ):
            model, _, _, output = step_of(recipe)
            (output.loss + 0).backward()
        found.append([output.loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        most.append(max(made))
    assert most[0] > 5 >= most[1]
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-4)


def test_lessons_are_read_once_for_all_runs(base: str, text: str, tmp_path: Path) -> None:
    """Catches lessons of other texts, weights or ways of reading, and a run that depends on who read first."""
    loss = FAR | {"lessons": str(tmp_path / "lessons")}
    schedule = {"steps": 4, "batch_size": 2}
    losses = []
    for name in ("first", "second", "without"):
        own = loss if name != "without" else FAR
        trainer = Trainer(recipe_of(base, text, own, schedule=schedule), tmp_path / name)
        reads: list[int] = []
        assert trainer.teacher is not None
        plain, how = trainer.teacher._read_text, reads.append

        def read(decoder: Any, *rest: Any, plain: Any = plain, how: Any = how) -> Any:
            def counted(ids: torch.Tensor, **arguments: Any) -> Any:
                how(len(ids))
                return decoder(ids, **arguments)

            return plain(counted, *rest)

        trainer.teacher._read_text = read  # type: ignore[method-assign]
        rows: list[float] = []
        trainer.run(lambda _, row, rows=rows: rows.append(row["loss"]))
        losses.append(rows)
        assert bool(reads) == (name != "second")
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], rel=0.02)
    files = list((tmp_path / "lessons").iterdir())
    assert len(files) % 2 == 0 < len(files) <= 2 * 4 * 2
    content = files[0].read_bytes()
    for file in files:
        file.write_bytes(content[:-3] + b"abc")
    with pytest.raises(CorruptFileError, match="damaged"):
        Trainer(recipe_of(base, text, loss, schedule=schedule), tmp_path / "third").run()


def test_lessons_of_other_weights_are_not_taken(base: str, text: str, tmp_path: Path) -> None:
    """Catches a store that knows texts alone."""
    loss = {"full_attention": True, "lessons": str(tmp_path / "lessons")}
    recipe = recipe_of(base, text, loss)
    step_of(recipe)
    model, _ = load_base(base)
    model.model.layers[0].self_attn.v_proj.weight.data[0, 0] += 1.0
    model.save_pretrained(tmp_path / "other")
    TOKENIZER.save_pretrained(tmp_path / "other")
    number = len(list((tmp_path / "lessons").iterdir()))
    step_of(recipe_of(str(tmp_path / "other"), text, loss))
    assert len(list((tmp_path / "lessons").iterdir())) == 2 * number


@pytest.mark.parametrize(("early_share", "num_early"), [(0.0, None), (0.5, 2), (1.0, 4)])
def test_some_tokens_of_every_block_are_predicted(text: str, early_share: float, num_early: int | None) -> None:
    """Catches blocks without a predicted token, the same tokens in every sequence, and a share of other places."""
    section = {"length": 72, "repeat_tokens": 0, "sampled_tokens": 4, "early_share": early_share}
    packed = PackedInstructions(make_recipe((text,), instructions=section), TOKENIZER)
    batch = packed.batch(0)
    weighed = batch.weights_BT > 0
    assert batch.weights_BT.sum() == pytest.approx(1.0)
    for row in weighed:
        whole = [int(block.sum()) for block in row[:64].split(16)]
        assert whole == [4, 4, 4, 4]
        assert 1 <= int(row[64:].sum()) <= 2
        if num_early is not None:
            assert all(int(block[:4].sum()) >= num_early for block in row[:64].split(16))
    assert early_share == 1 or not torch.equal(weighed[0], weighed[1])
    assert torch.equal(packed.batch(0).weights_BT, batch.weights_BT)
    many = {"length": 72, "repeat_tokens": 0, "sampled_tokens": 4}
    places = sum(
        (PackedInstructions(make_recipe((text,), instructions=many), TOKENIZER).batch(n).weights_BT > 0).sum(0)
        for n in range(20)
    )
    assert isinstance(places, torch.Tensor)
    assert (places[:64] > 0).float().mean() > 0.95


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loss": {"far_context": 1.0}}, "without loss.full_attention"),
        ({"loss": {"lessons": "x"}}, "without loss.full_attention"),
        ({"loss": {"full_attention": True, "attention_outputs": 1.0}, "lora": None}, "no section lora"),
        ({"loss": {"full_attention": True, "attention_outputs": 1.0, "lessons": "x"}}, "reads every step anyway"),
        ({"instructions": {"early_share": 0.5}}, "without instructions.sampled_tokens"),
    ],
)
def test_contradictions_are_refused(base: str, text: str, sections: dict[str, Any], message: str) -> None:
    """Catches fields that would do nothing, or what the run would fail at."""
    sections = {"loss": {}} | sections
    lora = {} if "lora" in sections else {"lora": LORA}
    sections = {name: value for name, value in sections.items() if value is not None}
    with pytest.raises(RecipeError, match=message):
        make_recipe((text,), model={"base": base}, **lora, **sections)
