"""Instructions and texts, packed to sequences of one length, with a weight for every token and a repeated segment.

Source: section 3.1.1 of arXiv 2404.09173.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from transformerfam.errors import RecipeError
from transformerfam.files.reading import parse_json, read_whole
from transformerfam.tasks.batch import Batch
from transformerfam.tasks.text import TEXT_SUFFIX, encode, files_of
from transformerfam.tasks.unknown_words import require_known, unknown_share
from transformerfam.training.data.sequences import draw_block_size
from transformerfam.training.recipe.data_sections import InstructionSection
from transformerfam.training.recipe.recipe import Recipe

REPEAT_PROMPT = "[repeat random segment]:"
"""What announces the repeated segment; its weight is 0."""


@dataclass(frozen=True)
class Piece:
    """One line of a file: its tokens, and what each weighs."""

    ids: list[int]
    weights: list[float]


def read_instructions(tokenizer: Any, section: InstructionSection, key: str = "instructions.files") -> list[Piece]:
    """Read all files of a section.

    Args:
        tokenizer: a fast one, which gives the place of its tokens in the text.
        section: names the files.
        key: of the recipe that has the names, for messages.

    Raises:
        RecipeError: a file cannot be read, a line does not match the section, or no token has a weight above 0; the
            message names file and line.
    """
    pieces = []
    for path in files_of(section.files, key):
        try:
            content = read_whole(path).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"{key}: cannot read {str(path)!r} ({error}); give UTF-8 JSON lines or .txt files"
            ) from error
        if path.suffix.lower() == TEXT_SUFFIX:
            if content.strip():
                pieces.append(_piece(tokenizer, {"text": content}))
            continue
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                try:
                    pieces.append(_piece(tokenizer, parse_json(line)))
                except (ValueError, KeyError, TypeError) as error:
                    raise RecipeError(
                        f"{path}, line {number}: {error}; required is JSON with messages, with prompt and answer, or "
                        "with text"
                    ) from error
    if not any(weight for piece in pieces for weight in piece.weights):
        raise RecipeError(f"{key} hold no token of a weight above 0, which those of answers and texts have; give some")
    return pieces


def _piece(tokenizer: Any, values: dict[str, Any]) -> Piece:
    if "text" in values:
        parts = [(values["text"], True), (tokenizer.eos_token or "", True)]
    elif "messages" in values:
        parts = list(_rendered(tokenizer, values["messages"]))
    elif tokenizer.chat_template:
        messages = [("user", values["prompt"]), ("assistant", values["answer"])]
        parts = list(_rendered(tokenizer, [{"role": role, "content": content} for role, content in messages]))
    else:
        parts = [(values["prompt"], False), (values["answer"], True), (tokenizer.eos_token or "", True)]
    text = "".join(part for part, _ in parts)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    is_answer_C = [is_answer for part, is_answer in parts for _ in part]  # by character
    # A token over a boundary is of the part that it ends in: the space in front of a word is in the word's token.
    of_answer = [stop > start and is_answer_C[stop - 1] for start, stop in encoded["offset_mapping"]]
    weights = [1.0 if is_answer else 0.0 for is_answer in of_answer]
    return Piece(list(encoded["input_ids"]), weights)


def _rendered(tokenizer: Any, messages: Sequence[dict[str, str]]) -> Iterator[tuple[str, bool]]:
    """Yield a conversation as the chat template writes it, part by part, and whether each is the assistant's."""
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template for messages")
    done = ""
    for count, message in enumerate(messages, start=1):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[: count - 1], tokenize=False, add_generation_prompt=True)
        upto = tokenizer.apply_chat_template(messages[:count], tokenize=False)
        if not (before.startswith(done) and upto.startswith(before)):
            raise ValueError("the chat template does not write a conversation from its beginning to its end")
        yield before[len(done) :], False
        yield upto[len(before) :], True
        done = upto
    if not done:
        raise ValueError("the conversation has no message of the assistant")


class PackedInstructions:
    """The sequences of a recipe with instructions, and its batches: pure functions of seed and number.

    All pieces of an epoch, in the epoch's own order, are one stream, cut into sequences of one length; no mask
    separates two pieces.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any, key: str = "instructions.files") -> None:
        """Read and tokenise the files.

        Args:
            recipe: its section `instructions` names them.
            tokenizer: a fast one.
            key: of the recipe that has the names, for messages.

        Raises:
            RecipeError: see `read_instructions`.
            TransformerFamError: the tokenizer knows too little of the text.
        """
        assert recipe.instructions is not None
        self.section = recipe.instructions
        self.schedule = recipe.schedule
        self.seed = recipe.schedule.seed
        self.batch_size = recipe.schedule.batch_size
        self.least_block_size = recipe.fam.block_size
        self.block_sizes = recipe.schedule.block_sizes or (self.least_block_size,)
        self.pieces = read_instructions(tokenizer, self.section, key)
        self.announcement = encode(tokenizer, REPEAT_PROMPT) if self.section.repeat_tokens else []
        self.num_packed = self.section.length - len(self.announcement) - self.section.repeat_tokens
        self.unknown_share = unknown_share(tokenizer, [token for piece in self.pieces for token in piece.ids])
        if not recipe.data.allow_unknown:
            require_known(self.unknown_share, key, "set data.allow_unknown = true")
        num_tokens = sum(len(piece.ids) for piece in self.pieces)
        self.per_epoch = max(1, num_tokens // self.num_packed)
        self._stream: tuple[int, torch.Tensor, torch.Tensor] | None = None  # epoch, tokens, weights
        self._order: tuple[int, list[int]] | None = None  # epoch, places of its sequences

    def _epoch(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the stream of an epoch and its weights; the one in use is kept."""
        if self._stream is None or self._stream[0] != number:
            pieces = self.pieces[:]
            random.Random(f"{self.seed}/epoch/{number}").shuffle(pieces)
            ids = [i for piece in pieces for i in piece.ids]
            weights = [w for piece in pieces for w in piece.weights]
            while len(ids) < self.num_packed:  # less than one sequence in all files
                ids, weights = ids + ids, weights + weights
            self._stream = number, torch.tensor(ids), torch.tensor(weights)
        return self._stream[1], self._stream[2]

    def sequence(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens and the weights of sequence `number`, each `(length,)`."""
        epoch, place = divmod(number, self.per_epoch)
        ids, weights = self._epoch(epoch)
        if self.section.mix_sequences:
            if self._order is None or self._order[0] != epoch:
                places = list(range(self.per_epoch))
                random.Random(f"{self.seed}/mixed/{epoch}").shuffle(places)
                self._order = epoch, places
            place = self._order[1][place]
        packed = slice(place * self.num_packed, (place + 1) * self.num_packed)
        ids, weights = ids[packed], weights[packed]
        length = self.section.repeat_tokens
        if not length:
            return ids, weights
        start = random.Random(f"{self.seed}/repeat/{number}").randint(0, self.num_packed - length)
        ids = torch.cat((ids, torch.tensor(self.announcement, dtype=torch.long), ids[start : start + length]))
        nothing = torch.zeros(len(self.announcement))
        return ids, torch.cat((weights, nothing, torch.full((length,), self.section.repeat_weight)))

    def block_size(self, step: int) -> int:
        """Draw the block of a step."""
        return draw_block_size(self.seed, step, self.block_sizes)

    def num_repeats(self, step: int) -> int:
        """Return 0: no update is repeated."""
        return 0

    def batch(self, step: int, *args: Any) -> Batch:
        """Return the batch of a step; its weights sum to 1."""
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        ids, weights = (torch.stack(column) for column in zip(*map(self.sequence, numbers), strict=True))
        if self.section.sampled_tokens is not None:
            weights = weights * torch.stack([self._is_sampled(number) for number in numbers])
        return weighed_batch(ids, weights)

    def _is_sampled(self, number: int) -> torch.Tensor:
        """Draw the tokens of sequence `number` that are predicted, `(length,)`, some in every block."""
        assert self.section.sampled_tokens is not None
        draw, length = random.Random(f"{self.seed}/sampled/{number}"), self.section.length
        is_sampled = torch.zeros(length + 1, dtype=torch.bool)
        for start in range(0, length, self.least_block_size):
            places = range(start, min(start + self.least_block_size, length))
            count = min(len(places), math.ceil(self.section.sampled_tokens * len(places) / self.least_block_size))
            quarter = places[: math.ceil(len(places) / 4)]
            early = draw.sample(quarter, min(len(quarter), round(count * self.section.early_share)))
            rest = draw.sample([place for place in places if place not in early], count - len(early))
            is_sampled[torch.tensor(early + rest) + 1] = True  # a token is predicted at the place before it
        return is_sampled[:length]


def weighed_batch(ids_BT: torch.Tensor, weights_BT: torch.Tensor) -> Batch:
    """Return a batch in which every token is predicted with its weight; the weights are made to sum to 1."""
    shifted = torch.cat((weights_BT[:, 1:], torch.zeros(len(ids_BT), 1)), dim=1)
    return Batch(
        input_ids_BT=ids_BT,
        labels_BT=ids_BT.roll(-1, dims=1),
        weights_BT=shifted / shifted.sum().clamp(min=1e-9),
        is_key_BT=torch.zeros(ids_BT.shape, dtype=torch.bool),
        question_start=ids_BT.shape[1],
        keys=(None,) * len(ids_BT),
        is_told_B=torch.zeros(len(ids_BT), dtype=torch.bool),
        held=(None,) * len(ids_BT),
        num_told_B=torch.zeros(len(ids_BT), dtype=torch.long),
    )
