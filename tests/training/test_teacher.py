"""The base model as a teacher: what it reads, and how far from it a reader of the memory is."""

import dataclasses

import pytest
import torch
from tiny_models import SECTION
from training_recipes import small_recipe

from transformerfam.errors import RecipeError
from transformerfam.training.data.sequences import SequenceBuilder
from transformerfam.training.setup import build_trainee
from transformerfam.training.step.blocks import run_batch
from transformerfam.training.step.teacher import ReadsText, Teacher, Teaching, distance_to_teacher
from transformerfam.training.tiny import build_tiny_model, build_tiny_tokenizer
from transformerfam.training.trainer import Trainer
from transformerfam.weights.models import load_base

TOKENIZER = build_tiny_tokenizer()
TAUGHT = {"teacher": 1.0, "teacher_filler_tokens": [3, 9]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Write a plain random model with the tokenizer of the passkey text."""
    folder = tmp_path_factory.mktemp("base")
    model = build_tiny_model(SECTION, len(TOKENIZER))
    with torch.no_grad():  # small embeddings and sharp attention, so that what is read shows in the hidden states
        model.get_input_embeddings().weight.mul_(0.05)
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(10.0)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def taught_recipe(base, **sections):
    sections.setdefault("loss", TAUGHT)
    return small_recipe(model={"base": base}, **sections)


def test_teacher_reads_the_rows_own_key_and_ends_as_the_row_does(base):
    """A lesson about another row's key, or one that is a token off the question."""
    passing = {"probability": 0.8, "rows": "all", "ask_later": 1.0}
    builder = SequenceBuilder(taught_recipe(base, state_passing=passing), TOKENIZER)
    batch = builder.batch(0, 1, carried_keys=(12345, None, 678))
    assert len({len(ids) for ids in batch.teacher_ids_NT}) == 1
    for row, key in enumerate(batch.keys):
        taught = batch.is_taught_BT[row].nonzero()[:, 0]
        num_tokens = len(TOKENIZER(f" What is the pass key? The pass key is {key}")["input_ids"])
        length = batch.input_ids_BT.shape[1]
        assert taught.tolist() == list(range(length - num_tokens, length - 1))
        assert torch.equal(batch.teacher_ids_NT[row, -num_tokens:], batch.input_ids_BT[row, -num_tokens:])
        assert TOKENIZER.decode(batch.teacher_ids_NT[row]).count(str(key)) == 3


def test_plain_text_is_not_taught(base, tmp_path):
    """A row of a book that is pulled towards the answer to a question that it does not have."""
    (tmp_path / "book.txt").write_text("The grass is green. " * 30)
    data = {"passkey_sentences": 0.5, "book": 0.5, "books": str(tmp_path)}
    recipe = taught_recipe(base, data=data)
    builder = SequenceBuilder(recipe, TOKENIZER)
    batch = next(b for b in (builder.batch(step, 0) for step in range(20)) if 0 < b.keys.count(None) < 3)
    assert batch.is_taught_BT.any(1).tolist() == [key is not None for key in batch.keys]
    lesson = Teacher(base).read(batch)
    for row, key in enumerate(batch.keys):
        assert bool(lesson.hidden_LBQD[:, row].any()) == (key is not None)
    plain = dataclasses.replace(batch, teacher_ids_NT=None, is_taught_BT=None)
    assert Teacher(base).read(plain) is None


def test_what_all_rows_begin_with_is_read_once_and_changes_nothing(base):
    """Rows that continue another row's beginning, positions that start again, or a mask that hides the beginning."""
    batch = SequenceBuilder(taught_recipe(base), TOKENIZER).batch(0, 1)
    teacher = Teacher(base)
    lesson = teacher.read(batch)
    read = []
    teacher.model.get_decoder().register_forward_pre_hook(lambda module, args: read.append(tuple(args[0].shape)))
    again = teacher.read(batch)
    num_rows, length = batch.teacher_ids_NT.shape
    num_common = length - read[0][1]
    assert read == [(num_rows, length - num_common)]  # the beginning is kept from the first time
    assert num_common >= len(TOKENIZER(" The pass key is")["input_ids"])
    assert torch.equal(again.hidden_LBQD, lesson.hidden_LBQD)
    with torch.no_grad():
        whole = teacher.model.get_decoder()(batch.teacher_ids_NT, output_hidden_states=True)
    expected = torch.stack(whole.hidden_states[1:])[:, :, -lesson.hidden_LBQD.shape[2] :]
    torch.testing.assert_close(lesson.hidden_LBQD, expected, atol=1e-5, rtol=1e-4)


def test_distance_of_the_teacher_to_itself_is_zero_and_of_another_text_is_not(base):
    """Hidden states of one layer or token that are compared with those of the next."""
    batch = SequenceBuilder(taught_recipe(base), TOKENIZER).batch(0, 1)
    teacher = Teacher(base)
    lesson = teacher.read(batch)
    own = dataclasses.replace(
        batch,
        input_ids_BT=batch.teacher_ids_NT,
        is_taught_BT=batch.is_taught_BT[:, -batch.teacher_ids_NT.shape[1] :],
    )

    def distance(input_ids_BT, is_taught_BT, start):
        hidden = teacher.model.get_decoder()(input_ids_BT, output_hidden_states=True).hidden_states
        own_lesson = dataclasses.replace(lesson, is_taught_BT=is_taught_BT)
        columns = torch.arange(start, input_ids_BT.shape[1])
        return distance_to_teacher(own_lesson, tuple(h[:, start:] for h in hidden), columns)

    with torch.no_grad():
        whole = distance(own.input_ids_BT, own.is_taught_BT, 0)
        assert abs(whole) < 1e-4  # rounding, over 60 tokens
        other = distance(own.input_ids_BT.flip(0), own.is_taught_BT, 0)
        assert other > 0.01
        parts = distance(own.input_ids_BT.flip(0), own.is_taught_BT, own.is_taught_BT.shape[1] - 4)
        assert 0 < parts < other


def test_distance_to_the_teacher_does_not_depend_on_the_blocks(base):
    """A lesson that is shifted where question and answer lie across a boundary. Without FAM and with everything in
    sight the trainee is the base model, whatever the block."""
    losses = []
    teacher = Teacher(base)
    for block_size, segments in ((200, 0), (16, 13)):
        fam = {"fam_length": 0, "block_size": block_size, "num_memory_segments": segments, "fam_norm_bound": None}
        recipe = taught_recipe(base, fam=fam, schedule={"batch_size": 3, "curriculum": [{"filler_tokens": [20, 20]}]})
        batch = SequenceBuilder(recipe, TOKENIZER).batch(0, 0)
        model, _ = build_trainee(recipe)
        output = run_batch(model, batch, model.init_state(3), teaching=Teaching(teacher.read(batch), 2.0))
        plain = run_batch(model, batch, model.init_state(3))
        assert (output.loss - plain.loss).item() == pytest.approx(2.0 * output.teacher_loss.item(), abs=1e-5)
        losses.append(output.teacher_loss.item())
    assert losses[0] > 1e-3
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_gradient_of_the_distance_reaches_the_first_block_through_fam(base, checkpoint_blocks):
    """A distance that teaches to read and not to write."""
    recipe = taught_recipe(base)
    model, _ = build_trainee(recipe)
    batch = SequenceBuilder(recipe, TOKENIZER).batch(0, 1)
    batch.weights_BT[:] = 0.0
    state = model.init_state(3, fam=torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(0)))
    fams = [layer.fam.requires_grad_() for layer in state.layers]
    lesson = Teacher(base).read(batch)
    run_batch(model, batch, state, teaching=Teaching(lesson, 1.0), checkpoint_blocks=checkpoint_blocks).loss.backward()
    assert all(fam.grad.abs().sum() > 0 for fam in fams)


def test_training_with_a_teacher_comes_nearer_to_it(base, tmp_path):
    """A weight of the recipe that reaches no loss."""
    schedule = {"steps": 25, "curriculum": [{"filler_tokens": [4, 4]}], "seed": 1}
    recipe = taught_recipe(base, schedule=schedule, loss={**TAUGHT, "key": 0.0, "other_tokens": 0.0})
    rows = []
    Trainer(recipe, tmp_path).run(lambda trainer, row: rows.append(row["teacher_loss"]))
    assert sum(rows[-5:]) < 0.8 * sum(rows[:5])
    untaught = Trainer(small_recipe(model={"base": base}), tmp_path / "untaught")
    assert untaught.teacher is None


def test_teacher_keeps_the_plain_weights(base):
    """A teacher that shares weights with its pupil and learns from it."""
    teacher = Teacher(base)
    plain, _ = load_base(base)
    for name, value in plain.state_dict().items():
        assert torch.equal(teacher.model.state_dict()[name], value)
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_other_tokens_are_to_be_predicted_as_full_attention_does(base):
    """A divergence of another token or row, of the keys too, or from a teacher that reads another text. Without FAM and
    with everything in sight the trainee is the teacher."""
    loss = {"full_attention": True, "other_tokens": 1.0, "num_other_tokens": 1000, "key": 0.0}
    teacher = Teacher(base, reads_text=ReadsText())
    found = []
    for block_size in (512, 16):
        fam = {"block_size": block_size, "fam_length": 0, "num_memory_segments": 0}
        recipe = taught_recipe(base, loss=loss, fam=fam)
        model, _ = build_trainee(recipe)
        batch = SequenceBuilder(recipe, TOKENIZER).batch(0, 1)
        lesson = teacher.read(batch)
        with torch.no_grad():
            found.append(run_batch(model, batch, model.init_state(3), teaching=Teaching(lesson)).loss)
    assert abs(found[0]) < 1e-5
    plain, _ = load_base(base)
    with torch.no_grad():
        theirs = plain(batch.input_ids_BT).logits.log_softmax(-1)
        own = model(batch.input_ids_BT, use_cache=False).logits.log_softmax(-1)
    away = (theirs.exp() * (theirs - own)).sum(-1)
    expected = (away * batch.weights_BT)[~batch.is_key_BT].sum()
    torch.testing.assert_close(found[1], expected, atol=1e-5, rtol=1e-4)
    assert found[1] > 1e-3


def test_training_towards_full_attention_comes_nearer_to_it(base, tmp_path):
    """A divergence without gradient, or with the wrong sign."""
    loss = {"full_attention": True, "other_tokens": 1.0, "num_other_tokens": 64, "key": 0.0}
    recipe = taught_recipe(
        base, loss=loss, schedule={"steps": 16, "batch_size": 3, "curriculum": [{"filler_tokens": [40, 60]}]}
    )
    rows = []
    Trainer(recipe, tmp_path).run(lambda _, row: rows.append(row["loss"]))
    assert sum(rows[-4:]) < 0.6 * sum(rows[:4])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loss": {"full_attention": True}}, "loss.full_attention is set, and model.base is 'tiny-random'"),
        (
            {"model": {"base": "smollm2"}, "loss": {"full_attention": True}, "schedule": {"accumulate": 3}},
            "schedule.accumulate is above 1 with .* loss.full_attention",
        ),
    ],
)
def test_full_attention_without_a_teacher_is_refused(sections, message):
    """A run whose teacher is a random model, or whose parts have separate means."""
    with pytest.raises(RecipeError, match=message):
        small_recipe(**sections)
