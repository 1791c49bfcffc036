"""Lessons: what the model makes of a piece in its window, the same whenever it is made."""

import random

import pytest
import torch
from study_models import STUDY_BLOCK, TEXT, make_study_model

from transformerfam.config import PLAIN_UPDATE
from transformerfam.errors import TransformerFamError
from transformerfam.study.document import Pieces, require_sentences
from transformerfam.study.lessons import NUM_CUE_TOKENS, PROMPTS, Lesson, LessonMaker, divergence, sampled_tokens
from transformerfam.tasks.text import encode

KINDS = tuple(PROMPTS)


def maker(model, tokenizer, **options):
    pieces = Pieces(torch.tensor(encode(tokenizer, TEXT)), 16)
    return LessonMaker(model, tokenizer, pieces, **{"batch_size": 3, "answer_tokens": 6} | options)


def same(one: Lesson, other: Lesson) -> bool:
    tensors = ((one.ids_BT, other.ids_BT), (one.hidden_BND, other.hidden_BND), (one.is_target_BN, other.is_target_BN))
    return one.kind == other.kind and all(torch.equal(a, b) for a, b in tensors)


def test_lesson_depends_on_its_number_and_the_seed_alone():
    """Catches a resumed study that learns from other lessons than one that was not stopped."""
    model, tokenizer = make_study_model()
    first, again = maker(model, tokenizer), maker(model, tokenizer)
    torch.manual_seed(5)
    lessons = [first.lesson(number) for number in range(len(KINDS) + 1)]
    assert [lesson.kind for lesson in lessons] == [*KINDS, KINDS[0]]
    assert same(again.lesson(3), lessons[3])
    assert same(again.lesson(1), lessons[1])
    assert not same(again.lesson(len(KINDS)), lessons[0])
    assert not same(maker(model, tokenizer, seed=1).lesson(1), lessons[1])
    assert not same(again.lesson(1, held_out=True), lessons[1])


@torch.no_grad()
def test_teacher_expects_what_the_model_expects_with_the_piece_in_sight():
    """Catches a teacher that does not see the piece, or hidden states that are a token off."""
    model, tokenizer = make_study_model()
    made = maker(model, tokenizer)
    for number, kind in enumerate(KINDS):
        lesson = made.lesson(number)
        draw = random.Random(f"0/learned/{number}")
        pieces_BT = made.pieces.draw(draw, 3)
        before_BT = pieces_BT[:, :-NUM_CUE_TOKENS] if kind == "continue" else pieces_BT
        whole_BT = torch.cat((before_BT, lesson.ids_BT), dim=1)
        logits = model(input_ids=whole_BT, past_key_values=model.init_state(3)).logits
        count = lesson.is_target_BN.shape[1]
        expected = logits[:, -count - 1 : -1]
        torch.testing.assert_close(model.lm_head(lesson.hidden_BND), expected, atol=1e-4, rtol=1e-4)
        assert lesson.ids_BT.shape[1] == lesson.num_prompt_tokens + count
        if kind == "repeat":
            assert torch.equal(lesson.ids_BT[:, lesson.num_prompt_tokens :], pieces_BT)
        state = model.read(before_BT)
        assert divergence(model, state, lesson) < 1e-6
        assert divergence(model, model.init_state(3), lesson) > 1e-4


@torch.no_grad()
def test_hidden_memory_does_not_show_in_what_the_teacher_expects():
    """Catches an untrained memory that spoils the lessons."""
    model, tokenizer = make_study_model()
    bare, _ = make_study_model(**PLAIN_UPDATE | {"fam_length": 0})
    hidden, shown = (maker(model, tokenizer, hides_memory=hides).lesson(3) for hides in (True, False))
    plain = maker(bare, tokenizer).lesson(3)
    torch.testing.assert_close(hidden.hidden_BND, plain.hidden_BND, atol=1e-5, rtol=1e-4)
    assert (shown.hidden_BND - plain.hidden_BND).abs().max() > 1e-3


def test_tokens_after_an_end_do_not_count():
    """Catches lessons about what a model says after it has ended."""
    model, tokenizer = make_study_model()
    made = maker(model, tokenizer, answer_tokens=30, temperature=5.0)
    made.ends = set(range(4, 20))
    lesson = next(lesson for lesson in map(made.lesson, range(0, 80, len(KINDS))) if not lesson.is_target_BN.all())
    said_BN = lesson.ids_BT[:, lesson.num_prompt_tokens :]
    for said, counts in zip(said_BN.tolist(), lesson.is_target_BN.tolist(), strict=True):
        ends = [place for place, token in enumerate(said) if token in made.ends]
        assert counts == [not ends or place <= ends[0] for place in range(len(said))]


@torch.no_grad()
def test_drawn_tokens_follow_the_distribution_and_the_seed():
    """Catches the likeliest token in place of a drawn one, and draws of torch's own generator."""
    model, tokenizer = make_study_model()
    ids_BT = torch.tensor([encode(tokenizer, TEXT)[:8]] * 400)

    def drawn(seed, temperature):
        generator = torch.Generator().manual_seed(seed)
        return sampled_tokens(model, ids_BT, model.init_state(400), 1, temperature, generator)[0][:, 0]

    assert torch.equal(drawn(0, 1.0), drawn(0, 1.0))
    assert not torch.equal(drawn(0, 1.0), drawn(1, 1.0))
    logits_V = model(input_ids=ids_BT[:1], past_key_values=model.init_state()).logits[0, -1]
    likeliest = int(logits_V.argmax())
    for temperature in (1.0, 0.1):
        share = (drawn(0, temperature) == likeliest).float().mean()
        assert abs(share - (logits_V / temperature).softmax(-1)[likeliest]) < 0.1


def test_pieces_cover_the_text_and_those_held_out_begin_elsewhere():
    """Catches an end of the text that is never studied, and held-out pieces that are the learned ones."""
    pieces = Pieces(torch.arange(50), 16)
    assert pieces.starts() == [0, 16, 32, 34]
    assert pieces.starts(held_out=True) == [8, 24]
    assert Pieces(torch.arange(32), 16).starts() == [0, 16]
    assert Pieces(torch.arange(16), 16).starts(held_out=True) == [0]
    drawn = pieces.draw(random.Random(0), 6)
    assert sorted(set(drawn[:, 0].tolist())) == [0, 16, 32, 34]
    assert drawn.shape == (6, 16)
    with pytest.raises(TransformerFamError, match="the text has 15 tokens, required are at least those of a piece, 16"):
        Pieces(torch.arange(15), 16)


@pytest.mark.parametrize("text", ["He came. She left", 'Who is it?" he said', "她来了。", "a\nb c!\n"])
def test_sentence_is_found(text):
    """Catches a text that is refused because of its quotes, its script or its lines."""
    require_sentences(text, "it")


@pytest.mark.parametrize("text", ["", "1.5 2.5 3.5\n" * 9, "word " * 99, "12. 13. 14.", "a,b,c\n1,2,3\n", "Title."])
def test_text_without_a_sentence_is_refused(text):
    """Catches questions that are made of a table of numbers."""
    with pytest.raises(TransformerFamError, match="it has no sentence .* give a text of sentences, or read it with"):
        require_sentences(text, "it")


def test_lesson_that_fits_no_block_or_window_is_refused():
    """Catches lessons that complete a block, whose rows are then others, or a teacher that has lost the piece."""
    model, tokenizer = make_study_model()
    with pytest.raises(
        TransformerFamError,
        match="after a piece of 16; a block has 64 tokens, the window 128",
    ):
        LessonMaker.require_room(model.fam_config.replace(num_memory_segments=1), tokenizer, 16, STUDY_BLOCK)
    with pytest.raises(TransformerFamError, match="'repeat' has .* give smaller pieces .--piece-tokens., or"):
        LessonMaker.require_room(model.fam_config, tokenizer, 30, 1)
    LessonMaker.require_room(model.fam_config.replace(num_memory_segments=1), tokenizer, 30, 1)


def test_lengths_that_nobody_gives_fit_the_block():
    """Catches defaults that every study with a small block is refused for, and given lengths that are changed."""
    model, tokenizer = make_study_model()
    config = model.fam_config
    pieces, answers = LessonMaker.fitting(config, tokenizer, None, None)
    LessonMaker.require_room(config, tokenizer, pieces, answers)
    assert 16 <= pieces < 128
    assert LessonMaker.fitting(config.replace(block_size=512), tokenizer, None, None) == (128, 48)
    assert LessonMaker.fitting(config, tokenizer, 17, 5) == (17, 5)
    for given in ((STUDY_BLOCK, None), (None, STUDY_BLOCK)):
        with pytest.raises(TransformerFamError, match="give smaller pieces"):
            LessonMaker.fitting(config, tokenizer, *given)
