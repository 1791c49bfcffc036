"""A text begins with what its tokenizer begins texts with, and a continuation does not, wherever one is read."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from handed_over import handed_over
from tiny_models import BLOCK_SIZE, make_passkey_model
from tokenizers import Tokenizer, models
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from training_recipes import small_recipe
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from transformerfam import FamConfig, convert
from transformerfam.errors import RecipeError, TransformerFamError
from transformerfam.tasks.batch import Batch
from transformerfam.tasks.next_token import evaluate_next_token
from transformerfam.tasks.passkey import PasskeyText
from transformerfam.tasks.passkey_evaluation import evaluate_passkey
from transformerfam.tasks.ragged import greedy_tokens
from transformerfam.tasks.reading import count_tokens, generate_text, read_text_stream
from transformerfam.tasks.text import (
    decode_utf8,
    encode,
    encode_rest,
    encode_start,
    read_text,
    start_ids,
    stream_token_ids,
)
from transformerfam.training import trainer
from transformerfam.training.recipe.recipe import Recipe
from transformerfam.training.setup import build_trainee

TEXT = "There and back again. The grass is green. The sky is blue. The sun is yellow. Here we go. " * 4
START = 3
BEGIN = 1
"""No word of any text."""


@pytest.fixture
def model_and_tokenizer() -> tuple[Any, Any]:
    """A model whose tokenizer begins every text with a token, and ends it with another."""
    model, tokenizer = make_passkey_model()
    first, last = (tokenizer.convert_ids_to_tokens(i) for i in (START, START + 1))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(first, START), (last, START + 1)]
    )
    tokenizer.bos_token = first
    return model, tokenizer


def test_start_is_what_stands_in_front(model_and_tokenizer: tuple[Any, Any]) -> None:
    """Catches a token after the text that is taken for one in front, and a start that is there twice."""
    _, tokenizer = model_and_tokenizer
    assert start_ids(tokenizer) == [START]
    assert start_ids(make_passkey_model()[1]) == []
    assert encode_start(tokenizer, TEXT) == [START, *encode(tokenizer, TEXT)]
    again = tokenizer.decode([START]) + " The grass"
    assert encode_start(tokenizer, again) == encode(tokenizer, again)
    for begins in (False, True):
        ids = [i for piece in stream_token_ids([TEXT], tokenizer, 50, begins=begins) for i in piece]
        assert ids == [START] * begins + encode(tokenizer, TEXT)


def word_tokenizer(words: str, unknown: str | None = None, bos: str = "<s>", template: str = "<s> $A") -> Any:
    """Return a tokenizer of a few words that begins, or ends, texts with a token."""
    words_ = ["<s>", "</s>", *words.split()]
    known = {word: number for number, word in enumerate(words_)}
    backend = Tokenizer(models.WordLevel(known, unk_token=unknown) if unknown else models.BPE(known, []))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.normalizer = Replace("a", "")
    backend.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="</s>")


@pytest.mark.parametrize(
    ("words", "unknown", "template", "start"),
    [
        ("the sun [UNK]", "[UNK]", "<s> $A", [0]),
        ("the sun", "<s>", "<s> $A", [0]),
        ("the sun", "<s>", "<s> $A </s>", [0]),
        ("the sun", "<s>", "<s> <s> $A", [0, 0]),
        ("the sun", "<s>", "$A", []),
        ("the sun", "</s>", "$A </s>", []),
        ("t h e", None, "<s> $A", [0]),
        ("t h e", None, "$A </s>", []),
        ("ж", None, "<s> $A", [0]),
        ("ж", None, "$A </s>", []),
        ("ж", "<s>", "<s> $A", [0]),
    ],
)
def test_start_is_found_whatever_the_vocabulary(words: str, unknown: str, template: str, start: list[int]) -> None:
    """Catches a beginning that is lost where "a" has no token, or that of the beginning itself."""
    tokenizer = word_tokenizer(words, unknown, template=template)
    assert start_ids(tokenizer) == start
    for text in (words, "zzz " + words):
        whole = tokenizer(text)["input_ids"]
        assert encode_start(tokenizer, text) == whole[: len(whole) - template.endswith("</s>")]
        assert [*start, *encode_rest(tokenizer, text)] == encode_start(tokenizer, text)


def test_text_that_has_its_start_begins_once_and_a_continuation_never(
    model_and_tokenizer: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the start of a chat template, or of a file, in the middle of a reading, or twice at its beginning."""
    model, _ = model_and_tokenizer
    tokenizer = word_tokenizer("the sun is", "</s>")
    tokenizer.chat_template = "{{ bos_token }} {{ messages[0].content }}"
    own = encode(tokenizer, "the sun")
    for begins in (True, False):
        assert list(stream_token_ids(["<s> the", " sun"], tokenizer, begins=begins)) == [[0] * begins + own]
    asked: list[list[int]] = []

    def noted(model: Any, ids: Any, *args: Any, **options: Any) -> Any:
        asked.append(ids[0].tolist())
        return greedy_tokens(model, ids, *args, **options)

    monkeypatch.setattr("transformerfam.tasks.reading.greedy_tokens", noted)
    for chat, question in ((True, "the sun"), (False, "<s> the sun"), (False, "the sun")):
        asked.clear()
        state = model.init_state()
        for _ in range(2):
            generate_text(model, tokenizer, question, state, 1, chat)
        assert asked == [[0, *own], own]


def test_reading_begins_once(model_and_tokenizer: tuple[Any, Any], tmp_path: Path) -> None:
    """Catches `fam read` that reads a token less than the README, and a second text that restarts."""
    model, tokenizer = model_and_tokenizer
    (tmp_path / "book.txt").write_text(TEXT)
    own = encode(tokenizer, TEXT)
    state = read_text_stream(model, tokenizer, [TEXT])
    by_hand = model.read([START, *own])
    assert state.histories == by_hand.histories
    assert state.num_tokens_read == count_tokens(tmp_path / "book.txt", tokenizer) == len(own) + 1
    rest = read_text_stream(model, tokenizer, [TEXT], model.read([START, *own[:9]]), skip_tokens=10)
    assert rest.histories == by_hand.histories
    more = read_text_stream(model, tokenizer, [TEXT], state)
    assert more.histories == model.read([START, *own, *own]).histories
    for begun in (model.init_state(), by_hand):
        before = begun.num_tokens_read
        twin = begun.fork()
        generate_text(model, tokenizer, "The grass", begun, 1)
        ids = encode(tokenizer, "The grass")
        assert begun.histories == model.read(ids if before else [START, *ids], twin).histories


def test_tasks_begin_their_texts(model_and_tokenizer: tuple[Any, Any], tmp_path: Path) -> None:
    """Catches a task whose texts begin otherwise than those that are read from files."""
    model, tokenizer = model_and_tokenizer
    with handed_over(model) as given:
        list(evaluate_passkey(model, tokenizer, filler_lengths=(9,), num_keys=3, systems=("fam",), prefix_tokens=4))
    ids, mask = given[0]
    firsts = [int(row[0 if mask is None else int(mask[i].argmax())]) for i, row in enumerate(ids)]
    assert firsts == [START] * 3
    text = PasskeyText(tokenizer)
    assert text.sequence(12345, 5).ids[0] == int(text.batch([12345], 5)[0, 0]) == START
    (tmp_path / "book.txt").write_text(TEXT)
    (row,) = evaluate_next_token(model, tokenizer, tmp_path / "book.txt")
    ids = torch.tensor([[START, *encode(tokenizer, TEXT)]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    assert row["num_predicted"] == ids.shape[1] - 1
    assert row["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])), rel=1e-4)


def test_harness_gives_the_scores_of_its_own_models(model_and_tokenizer: tuple[Any, Any]) -> None:
    """Catches contexts that begin otherwise than those of the harness's own models."""
    harness, huggingface = (
        pytest.importorskip("transformerfam.tools.lm_eval"),
        pytest.importorskip("lm_eval.models.huggingface"),
    )
    from lm_eval.api.instance import Instance

    model, tokenizer = model_and_tokenizer
    weights = {name: value for name, value in model.state_dict().items() if ".fam." not in name}
    bases = [LlamaForCausalLM(model.config).eval() for _ in range(2)]
    for base in bases:
        base.load_state_dict(weights)
    wide = FamConfig(fam_length=0, block_size=BLOCK_SIZE, num_memory_segments=20)
    ours = harness.FamLM(convert(bases[0], wide), tokenizer=tokenizer)
    theirs = huggingface.HFLM(bases[1], tokenizer=tokenizer, device="cpu", max_length=512)
    pairs = [(TEXT[:88], " The grass is green."), ("", "The sky is blue.")]
    for kind, arguments in (("loglikelihood", pairs), ("loglikelihood_rolling", [(TEXT[:88],)])):
        requests = [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]
        found, expected = (getattr(lm, kind)(requests, disable_tqdm=True) for lm in (ours, theirs))
        flat = [[one[0] if isinstance(one, tuple) else one for one in scores] for scores in (found, expected)]
        assert flat[0] == pytest.approx(flat[1], rel=1e-4)


def test_byte_order_mark_is_no_token(tmp_path: Path) -> None:
    """Catches a mark that is read as text, and positions of wrong bytes that leave it out."""
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbfThe grass")
    assert read_text(tmp_path / "book.txt") == "The grass"
    for size in (1, 2, 3, 50):
        data = b"\xef\xbb\xbfThe \xe2\x82\xac"
        pieces = [data[i : i + size] for i in range(0, len(data), size)]
        assert "".join(decode_utf8(pieces, "x")) == "The €"
        wrong = b"\xef\xbb\xbfThe \xff."
        with pytest.raises(TransformerFamError, match="byte 0xff at position 7"):
            list(decode_utf8([wrong[i : i + size] for i in range(0, len(wrong), size)], "x"))


def with_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tiny model's tokenizer begin texts with a token, wherever a recipe is trained."""

    def build(recipe: Recipe) -> Any:
        model, tokenizer = build_trainee(recipe)
        first = tokenizer.convert_ids_to_tokens(BEGIN)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, BEGIN)]
        )
        return model, tokenizer

    monkeypatch.setattr(trainer, "build_trainee", build)


@pytest.mark.parametrize("is_told", [False, True])
def test_training_text_begins_where_no_state_is_passed(
    is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a memory that is trained on texts without their beginning and queried with it."""
    data = {"named_keys": (1, 2)} if is_told else {}
    recipe = small_recipe(
        data=data,
        schedule={"steps": 6, "curriculum": [{"filler_tokens": [20, 40]}]},
        state_passing={"probability": 0.6},
    )
    with_start(monkeypatch)
    began: list[tuple[bool, Batch]] = []

    def noted(self: Batch, start: list[int], is_passed: bool) -> Batch:
        batch = begun(self, start, is_passed)
        began.append((is_passed, batch))
        with_teacher = begun(dataclasses.replace(self, teacher_ids_NT=self.input_ids_BT), start, is_passed)
        assert with_teacher.teacher_ids_NT is not None
        assert with_teacher.teacher_ids_NT[:, 0].eq(BEGIN).all()
        num = 0 if is_passed else 1
        torch.testing.assert_close(batch.input_ids_BT[:, num:], self.input_ids_BT)
        for old, new in zip(self.weights_BT.nonzero(), batch.weights_BT.nonzero(), strict=True):
            assert new.tolist() == [int(old[0]), int(old[1]) + num]
            assert batch.labels_BT[*new] == self.labels_BT[*old]
            assert batch.is_key_BT[*new] == self.is_key_BT[*old]
        assert (batch.question_start, *batch.num_told_B.tolist()) == tuple(
            num + n for n in (self.question_start, *self.num_told_B.tolist())
        )
        return batch

    begun = Batch.begun
    monkeypatch.setattr(Batch, "begun", noted)
    trainer.Trainer(recipe, tmp_path / "run").run()
    assert {is_passed for is_passed, _ in began} == {False, True}
    for is_passed, batch in began:
        assert bool(batch.input_ids_BT[:, 0].eq(BEGIN).all()) != is_passed


def test_stored_filler_has_no_place_for_a_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe(schedule={"stored_blocks": 4, "steps_per_stored_block": 1})
    with_start(monkeypatch)
    with pytest.raises(RecipeError, match="stored_blocks is above 0, and the tokenizer begins texts with special"):
        trainer.Trainer(recipe, tmp_path / "run")
