"""Batches and passed states."""

import pytest
import torch
from training_recipes import small_recipe

from transformerfam.errors import RecipeError
from transformerfam.tasks.passkey import PasskeyText
from transformerfam.training.data.sequences import SequenceBuilder
from transformerfam.training.recipe.sections import StatePassingSection
from transformerfam.training.state_passing import SavedFam, StatePassing, held_keys
from transformerfam.training.tiny import build_tiny_tokenizer

TOKENIZER = build_tiny_tokenizer()
PASSES_ALL = {"probability": 0.8, "rows": "all", "ask_later": 1.0}


def test_tiny_tokenizer_gives_every_digit_one_token():
    """A key that the tiny model would have to guess from a word it does not know."""
    text = "There is an important info. The pass key is 12345. What is the pass key?"
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.tokenize(" 907")[1:] == ["9", "0", "7"]


def test_batch_depends_on_seed_step_and_stage_alone():
    """A resumed run that sees other data."""
    builder, again = (SequenceBuilder(small_recipe(), TOKENIZER) for _ in range(2))
    builder.batch(0, 0)
    first, second = builder.batch(4, 1), again.batch(4, 1)
    assert torch.equal(first.input_ids_BT, second.input_ids_BT)
    assert torch.equal(first.weights_BT, second.weights_BT)
    assert not torch.equal(first.input_ids_BT[0], builder.batch(5, 1).input_ids_BT[0, : first.input_ids_BT.shape[1]])


def test_labels_are_the_next_tokens_and_the_key_is_weighed():
    """Weights that are one position off, so that the model learns to repeat its input."""
    builder = SequenceBuilder(small_recipe(), TOKENIZER)
    batch = builder.batch(0, 1)
    assert torch.equal(batch.labels_BT[:, :-1], batch.input_ids_BT[:, 1:])
    assert batch.weights_BT[:, -1].sum() == 0
    assert len(set(batch.keys)) == 3
    for row, key in enumerate(batch.keys):
        answer = batch.labels_BT[row][batch.is_key_BT[row]]
        assert TOKENIZER.decode(answer) == f" {key}"
        assert TOKENIZER.decode(batch.input_ids_BT[row, batch.question_start :]).startswith(" What is the pass key?")
    assert batch.weights_BT[batch.is_key_BT].sum() == pytest.approx(1.0)
    assert batch.weights_BT.sum() == pytest.approx(1.1)


def test_question_stands_at_every_phase_of_a_block():
    """Questions that never cross a block boundary in training, and always fail there in use."""
    builder = SequenceBuilder(small_recipe(), TOKENIZER)
    phases = {builder.batch(step, 1).question_start % 16 for step in range(200)}
    assert phases == set(range(16))


def test_asking_later_asks_for_the_key_that_the_state_holds():
    """A row that gives a new key and queries the old one, or the other way round."""
    builder = SequenceBuilder(small_recipe(state_passing=PASSES_ALL), TOKENIZER)
    batch = builder.batch(3, 1, carried_keys=(12345, None, 67890))
    assert batch.keys[0] == 12345
    assert batch.keys[2] == 67890
    text = TOKENIZER.decode(batch.input_ids_BT[0])
    assert text.count("12345") == 1
    assert text.endswith("The pass key is 12345")
    assert TOKENIZER.decode(batch.input_ids_BT[1]).count(str(batch.keys[1])) == 3


def test_keys_have_as_many_digits_as_the_recipe_says():
    """A longer key that is given whole and queried in part, or a shorter one queried later by a misplaced question."""
    builder = SequenceBuilder(small_recipe(data={"key_digits": [4, 7]}, state_passing=PASSES_ALL), TOKENIZER)
    lengths = set()
    for step in range(40):
        batch = builder.batch(step, 0, carried_keys=(None, 123, 12345678))
        lengths.add(len(str(batch.keys[0])))
        assert batch.keys[1:] == (123, 12345678)
        for row, key in enumerate(batch.keys):
            assert TOKENIZER.decode(batch.labels_BT[row][batch.is_key_BT[row]]) == f" {key}"
            asked = TOKENIZER.decode(batch.input_ids_BT[row, batch.question_start :])
            assert asked.endswith(f" What is the pass key? The pass key is {key}")
        told = TOKENIZER.decode(batch.input_ids_BT[0])
        assert told.count(str(batch.keys[0])) == 3
    assert lengths == {4, 5, 6, 7}


def test_question_without_gradient_is_refused():
    """A key that is counted as right because nothing of it was predicted."""
    with pytest.raises(RecipeError, match="gradient_tokens is 8, required is at least"):
        SequenceBuilder(small_recipe(schedule={"gradient_tokens": 8}), TOKENIZER)


def test_key_is_told_behind_a_prefix():
    """A memory that finds a key only where a text begins, or a prefix that is counted as filler."""
    builder = SequenceBuilder(small_recipe(data={"prefix_tokens": [5, 9]}, state_passing=PASSES_ALL), TOKENIZER)
    text = builder.writer.texts["passkey_sentences"]
    places = set()
    for step in range(30):
        batch = builder.batch(step, 0, carried_keys=(None, None, 12345))
        ids = batch.input_ids_BT[0].tolist()
        intro = text.intro_ids(batch.keys[0])
        place = next(i for i in range(len(ids)) if ids[i : i + len(intro)] == intro)
        places.add(place)
        num_filler = batch.question_start - place - len(intro)
        assert 1 <= num_filler <= 30
        filler = ids[:place] + ids[place + len(intro) : batch.question_start]
        starts = range(len(text.filler))
        assert any(filler == text.filler.slice(start, len(filler)).tolist() for start in starts)
        assert TOKENIZER.decode(batch.input_ids_BT[2, batch.question_start :]).endswith("12345")
    assert places == set(range(5, 10))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_questions_stand_across_a_boundary_in_their_share(share):
    """A memory that never trained the phases at which question and answer lie in different blocks."""
    fam = {"block_size": 64, "fam_length": 4}
    stage = {"curriculum": [{"filler_tokens": [20, 150]}]}
    data = {"boundary_share": share, "prefix_tokens": [0, 9]}
    builder = SequenceBuilder(small_recipe(data=data, fam=fam, schedule=stage), TOKENIZER)
    text = builder.writer.texts["passkey_sentences"]
    num_intro, num_answer = len(text.intro_ids(12345)), len(text.key_ids(12345))
    is_parted = []
    for step in range(200):
        batch = builder.batch(step, 0)
        last_asked = batch.input_ids_BT.shape[1] - 1
        is_parted.append(batch.question_start // 64 != last_asked // 64)
        assert 20 <= batch.question_start - num_intro <= 159
    by_chance = (len(text.question_ids) + num_answer - 1) / 64
    assert sum(is_parted) / 200 == pytest.approx(share + (1 - share) * by_chance, abs=0.1)


def test_books_are_mixed_in_by_their_share(tmp_path):
    """Book text that queries a key which it does not hold."""
    (tmp_path / "a.txt").write_text("The sky is blue.\n\nThe grass is green.")
    data = {"passkey_sentences": 1.0, "book": 1.0, "passkey_book": 1.0, "books": str(tmp_path)}
    builder = SequenceBuilder(small_recipe(data=data, schedule={"batch_size": 30}), TOKENIZER)
    batch = builder.batch(0, 1)
    plain = [row for row, key in enumerate(batch.keys) if key is None]
    assert 0 < len(plain) < 30
    assert not batch.is_key_BT[plain].any()
    assert (batch.weights_BT[plain].sum(1) > 0).all()


def test_filler_of_text_alone_is_the_text(tmp_path):
    """Stored filler, and what is read between two steps, that no share of passkeys says the kind of."""
    (tmp_path / "a.txt").write_text("The sky is blue.\n\nThe grass is green.")
    data = {"passkey_sentences": 0.0, "book": 1.0, "books": str(tmp_path)}
    builder = SequenceBuilder(small_recipe(data=data), TOKENIZER)
    assert set(builder.filler(0, 30)[0].tolist()) <= set(builder.writer.read[0].period_T.tolist())


def test_empty_folder_of_books_is_refused(tmp_path):
    """Training that silently continues without books."""
    with pytest.raises(RecipeError, match=r"at least one \.txt file"):
        SequenceBuilder(small_recipe(data={"book": 0.5, "books": str(tmp_path)}), TOKENIZER)


def test_state_is_passed_with_its_probability_once_started():
    """State passing that starts too early, or a chain that never ends."""
    passing = StatePassing(StatePassingSection(probability=0.8, start_stage=1, rows="all"), seed=0)
    fam = torch.randn(2, 3, 4, 5)
    passing.keep(0, fam, (1, 2, 3))
    passing.update_start(10, 0)
    assert all(passing.draw(step) is None for step in range(20))
    passing.update_start(11, 1)
    passed = [passing.draw(step) is not None for step in range(1000)]
    assert 0.75 < sum(passed) / 1000 < 0.85
    assert torch.equal(passing.draw(passed.index(True)).fam_LBFD, fam)


def test_first_rows_state_is_passed_to_all_rows():
    """Another batch row's FAM than the paper's."""
    passing = StatePassing(StatePassingSection(probability=1.0), seed=0)
    passing.update_start(0, 0)
    fam = torch.randn(2, 3, 4, 5, requires_grad=True)
    passing.keep(0, fam, (7, 8, 9))
    saved = passing.draw(0)
    assert torch.equal(saved.fam_LBFD, fam[:, :1].expand_as(fam))
    assert not saved.fam_LBFD.requires_grad
    assert saved.keys == (7, 7, 7)


def test_state_that_is_not_finite_is_not_passed():
    """One overflow that spoils every later step."""
    passing = StatePassing(StatePassingSection(probability=1.0), seed=0)
    passing.update_start(0, 0)
    passing.keep(0, torch.full((1, 1, 1, 1), torch.inf), (7,))
    assert passing.draw(0) is None


def test_noise_is_a_share_of_each_rows_size_and_depends_on_the_step_alone():
    """Noise that drowns small rows, that a resumed run draws again, or that reaches no passed state."""

    def passed(step, noise=0.5):
        passing = StatePassing(StatePassingSection(probability=1.0, rows="all", noise=noise), seed=0)
        passing.update_start(0, 0)
        passing.keep(step, fam, (1, 2))
        return passing.draw(0).fam_LBFD

    scale = torch.tensor([1.0, 100.0]).view(1, 1, 2, 1)
    fam = scale * torch.ones(3, 2, 2, 4000)
    torch.testing.assert_close(((passed(4) - fam) / scale).std(-1), torch.full((3, 2, 2), 0.5), atol=0.03, rtol=0)
    assert torch.equal(passed(4), passed(4))
    assert not torch.equal(passed(4), passed(5))
    assert torch.equal(passed(4, noise=0.0), fam)


def test_share_of_keys_has_few_different_digits():
    """Keys out of range, or keys of few digits in another share than the recipe's."""
    builder = SequenceBuilder(small_recipe(data={"few_digits": 0.5}, schedule={"batch_size": 400}), TOKENIZER)
    keys = builder.batch(0, 0).keys
    assert all(10_000 <= key <= 99_999 for key in keys)
    few = [key for key in keys if len(set(str(key))) <= 3]
    assert 0.5 < len(few) / len(keys) < 0.7  # 0.5 drawn so, and 0.19 of the others
    assert len(set(few)) > 150


def test_plain_text_keeps_the_key_of_the_passed_state():
    """A chain that ends wherever a row reads a book, so that training holds keys for fewer updates than it says."""
    start = SavedFam(torch.zeros(1, 4, 1, 1), (11111, 22222, None, 44444))
    asked, is_held = (None, 22222, 33333, 44444), (True, False, True, True)
    assert held_keys(start, asked, is_held) == (11111, None, 33333, 44444)
    assert held_keys(None, asked, is_held) == (None, None, 33333, 44444)


def test_every_step_draws_a_block_and_its_filler_grows_with_it():
    """Larger blocks whose question is always in the block of the key."""
    sizes = (16, 24, 64)
    schedule = {"block_sizes": list(sizes), "curriculum": [{"filler_tokens": [1, 9]}]}
    builder = SequenceBuilder(small_recipe(schedule=schedule), TOKENIZER)
    lengths = {size: set() for size in sizes}
    for step in range(200):
        lengths[builder.block_size(step)].add(builder.batch(step, 0).input_ids_BT.shape[1])
    shortest = min(lengths[16])
    for size in sizes:
        assert lengths[size] == set(range(shortest + size - 16, shortest + size - 16 + 9))


def test_short_intro_tells_the_key_without_the_sentences_in_front():
    """A first part of training that pays for 33 tokens without information."""
    builder = SequenceBuilder(small_recipe(data={"short_intro": True}), TOKENIZER)
    batch = builder.batch(0, 0)
    for row, key in enumerate(batch.keys):
        told = f" The pass key is {key}. Remember it. {key} is the pass key."
        assert TOKENIZER.decode(batch.input_ids_BT[row]).strip().startswith(told.strip())


def test_a_stage_has_a_prefix_of_its_own():
    """A stage whose keys are where those of the others are."""
    stages = [{"filler_tokens": [8, 8], "data": {"prefix_tokens": [5, 5]}}, {"filler_tokens": [8, 8]}]
    recipe = small_recipe(schedule={"steps": 9, "curriculum": stages}, data={"prefix_tokens": [9, 9]})
    builder = SequenceBuilder(recipe, TOKENIZER)
    intro = len(PasskeyText(TOKENIZER).intro_ids(12345))
    assert [builder.batch(0, stage).num_told_B[0] for stage in (0, 1)] == [5 + intro, 9 + intro]
    with pytest.raises(RecipeError, match=r"prefix_tokens is \[4, 3\]"):
        small_recipe(schedule={"curriculum": [{"filler_tokens": [8, 8], "data": {"prefix_tokens": [4, 3]}}]})


def test_a_stage_repeats_random_tokens():
    """Rows whose second time is another text, or that weigh tokens which nothing foretells."""
    stages = [{"filler_tokens": [0, 9], "repeated_tokens": [8, 30]}, {"filler_tokens": [8, 32]}]
    builder = SequenceBuilder(small_recipe(schedule={"steps": 9, "batch_size": 3, "curriculum": stages}), TOKENIZER)
    lengths, numbers = set(), set()
    for step in range(30):
        batch = builder.batch(step, 0)
        assert batch.keys == (None, None, None)
        for row in range(3):
            ids = batch.input_ids_BT[row].tolist()
            again = ids[batch.question_start :]
            assert ids[: len(again)] == again
            assert not set(again) & set(TOKENIZER.all_special_ids)
            (places,) = batch.is_key_BT[row].nonzero(as_tuple=True)
            assert batch.labels_BT[row, places].tolist() == again[4:]
            lengths.add(len(again))
            numbers.add(len(set(again)))
    assert min(lengths) < 12 < 26 < max(lengths) <= 30
    assert len(numbers) > 10
    assert all(key is not None for key in builder.batch(0, 1).keys)
    with pytest.raises(RecipeError, match=r"repeated_tokens is \[3, 9\], required is 8 <= low <= high"):
        small_recipe(schedule={"steps": 9, "curriculum": [{"filler_tokens": [0, 9], "repeated_tokens": [3, 9]}]})
