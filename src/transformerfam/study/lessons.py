"""Lessons that a model makes of a text itself: with a piece in its window it continues, asks and answers about it.

Source: self-study of Cartridges, arXiv 2506.06266.
"""

import random
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from transformerfam.config import FamConfig
from transformerfam.errors import TransformerFamError
from transformerfam.fam.state import FamState
from transformerfam.study.document import Pieces
from transformerfam.study.options import LEAST_PIECE, StudyOptions
from transformerfam.tasks.text import encode_rest, end_ids, start_ids

CONTINUE, REPEAT = "continue", "repeat"
PROMPTS = {
    "what": "\n\nQuestion: What",
    "facts": "\n\nThe facts in this text:\n1.",
    "who": "\n\nQuestion: Who",
    CONTINUE: "",
    "when": "\n\nQuestion: When",
    "summary": "\n\nIn short, the text says that",
    "how many": "\n\nQuestion: How many",
    REPEAT: "\n\nThe same text again, word for word:\n",
}
"""What follows a piece, by the kind of lesson. A continuation begins with the last tokens of the piece. Small models
ask about the piece once a question has begun, and about anything after "Question:" alone."""
NUM_CUE_TOKENS = 8
"""Last tokens of a piece with which its continuation begins."""
CLOSED = -1e4
"""Bias with which tokens see a memory that is hidden from them."""


@dataclass(frozen=True)
class Lesson:
    """Tokens that follow some pieces, and what the model with the pieces in its window expects of each."""

    kind: str
    ids_BT: torch.Tensor
    """Prompt and target."""
    num_prompt_tokens: int
    is_target_BN: torch.Tensor
    """Which of the last N tokens count: none after an end."""
    hidden_BND: torch.Tensor | None
    """The teacher's last hidden states, of which the head predicts the last N tokens; None: the tokens are right."""


def divergence(model: Any, state: FamState, lesson: Lesson) -> torch.Tensor:
    """Return how far a reading is from the teacher of a lesson, KL(teacher, own) in nats a token.

    Where there is no teacher, the loss of the tokens.

    Args:
        model: the model; its weights should not require gradients.
        state: a reading that ends with a block, of as many sequences as the lesson has; it moves on.
        lesson: what follows.
    """
    hidden_BTD = model.get_decoder()(input_ids=lesson.ids_BT[:, :-1], past_key_values=state).last_hidden_state
    head = model.get_output_embeddings()
    is_target = lesson.is_target_BN
    own_KV = head(hidden_BTD[:, lesson.num_prompt_tokens - 1 :][is_target]).float()
    if lesson.hidden_BND is None:
        return nn.functional.cross_entropy(own_KV, lesson.ids_BT[:, lesson.num_prompt_tokens :][is_target])
    with torch.no_grad():
        theirs_KV = head(lesson.hidden_BND[is_target]).float().log_softmax(-1)
    return nn.functional.kl_div(own_KV.log_softmax(-1), theirs_KV, reduction="batchmean", log_target=True)


@torch.no_grad()
def sampled_tokens(
    model: Any,
    ids_BT: torch.Tensor,
    state: FamState,
    num_tokens: int,
    temperature: float,
    generator: torch.Generator,
    ends: Collection[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Feed `ids_BT` and draw what follows, token by token.

    Args:
        model: the model.
        ids_BT: the prompt.
        state: what was read before; it moves on.
        num_tokens: tokens to draw; fewer where every sequence has one of `ends`.
        temperature: of the distribution.
        generator: of the random numbers.
        ends: tokens that end a sequence; what is drawn after one does not count.

    Returns:
        The tokens `(B, N)`, and the last hidden states that predict them, `(B, N, D)`.
    """
    said, hidden = [], []
    has_ended_B = torch.zeros(len(ids_BT), dtype=torch.bool)
    end_ids = torch.tensor(sorted(ends), dtype=torch.long)
    for _ in range(num_tokens):
        last_BD = model.get_decoder()(input_ids=ids_BT, past_key_values=state).last_hidden_state[:, -1]
        chances_BV = (model.get_output_embeddings()(last_BD).float().cpu() / temperature).softmax(-1)
        ids_BT = torch.multinomial(chances_BV, 1, generator=generator).to(last_BD.device)
        said.append(ids_BT)
        hidden.append(last_BD)
        has_ended_B |= torch.isin(ids_BT[:, 0].cpu(), end_ids)
        if bool(has_ended_B.all()):
            break
    return torch.cat(said, dim=1), torch.stack(hidden, dim=1)


class LessonMaker:
    """Make the lessons of a text, each by its number alone: whatever was made before, and whatever the rows are.

    Args:
        model: a converted model.
        tokenizer: its tokenizer.
        pieces: of the text.
        batch_size: pieces of a lesson.
        answer_tokens: tokens of a continuation, or of question and answer, at most.
        temperature: with which they are drawn.
        seed: of what is drawn.
        hides_memory: whether the teacher does not see the initial memory, as that of a model without training.
        kinds: kinds of lessons, of `PROMPTS`.

    Raises:
        TransformerFamError: a piece with what follows does not fit the window, or a lesson does not fit a block.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        pieces: Pieces,
        *,
        batch_size: int = 4,
        answer_tokens: int = 48,
        temperature: float = 0.4,
        seed: int = 0,
        hides_memory: bool = False,
        kinds: Collection[str] = tuple(PROMPTS),
    ) -> None:
        self.model, self.pieces = model, pieces
        self.batch_size, self.answer_tokens, self.temperature = batch_size, answer_tokens, temperature
        self.seed, self.hides_memory, self.kinds = seed, hides_memory, tuple(kinds)
        self.prompts = {kind: encode_rest(tokenizer, PROMPTS[kind]) if PROMPTS[kind] else [] for kind in self.kinds}
        self.start = start_ids(tokenizer)
        self.ends = end_ids(tokenizer, model.generation_config.eos_token_id)
        self.require_room(model.fam_config, tokenizer, pieces.num_tokens, answer_tokens, self.kinds)

    @staticmethod
    def require_room(
        config: FamConfig,
        tokenizer: Any,
        piece_tokens: int,
        answer_tokens: int,
        kinds: Collection[str] = tuple(PROMPTS),
    ) -> None:
        """Refuse lessons that fit no block, and pieces that do not fit the window with them; see `LessonMaker`."""
        window = (config.num_memory_segments + 1) * config.block_size
        for kind in kinds:
            cue = NUM_CUE_TOKENS if kind == CONTINUE else len(encode_rest(tokenizer, PROMPTS[kind]))
            own = cue + (piece_tokens if kind == REPEAT else answer_tokens)
            read = len(start_ids(tokenizer)) + piece_tokens
            if own > config.block_size or read + own > window:
                raise TransformerFamError(
                    f"a lesson of the kind {kind!r} has {own} tokens after a piece of {piece_tokens}; a block has "
                    f"{config.block_size} tokens, the window {window}; give smaller pieces (--piece-tokens), or "
                    "shorter answers (--answer-tokens)"
                )

    @classmethod
    def fitting(
        cls, config: FamConfig, tokenizer: Any, piece_tokens: int | None, answer_tokens: int | None
    ) -> tuple[int, int]:
        """Return tokens of pieces and of answers that fit.

        Those given are taken; in place of None as many as fit, up to the defaults.

        Raises:
            TransformerFamError: those given do not fit, or nothing does.
        """
        pieces = StudyOptions.piece_tokens if piece_tokens is None else piece_tokens
        while True:
            own = min(StudyOptions.answer_tokens, 2 * pieces // 3) if answer_tokens is None else answer_tokens
            try:
                cls.require_room(config, tokenizer, pieces, own)
                return pieces, own
            except TransformerFamError:
                smaller = 3 * pieces // 4
                if piece_tokens is not None or smaller < LEAST_PIECE:
                    raise
                pieces = smaller

    def lesson(self, number: int, held_out: bool = False) -> Lesson:
        """Return a lesson.

        Args:
            number: which.
            held_out: one of those that are never learned from: of pieces that begin in the middle of the others.
        """
        name = f"{self.seed}/{'held out' if held_out else 'learned'}/{number}"
        draw = random.Random(name)
        kind = self.kinds[number % len(self.kinds)]
        pieces_BT = self.pieces.draw(draw, self.batch_size, held_out).to(self.model.device)
        generator = torch.Generator().manual_seed(draw.getrandbits(63))
        return self._made(kind, pieces_BT, generator)

    @torch.no_grad()
    def _made(self, kind: str, pieces_BT: torch.Tensor, generator: torch.Generator) -> Lesson:
        state = self.teacher_state(len(pieces_BT))
        if kind == CONTINUE:
            pieces_BT, prompt_BT = pieces_BT[:, :-NUM_CUE_TOKENS], pieces_BT[:, -NUM_CUE_TOKENS:]
        else:
            prompt = torch.tensor(self.prompts[kind], device=pieces_BT.device)
            prompt_BT = prompt.expand(len(pieces_BT), -1)
        start = torch.tensor(self.start, dtype=torch.long, device=pieces_BT.device).expand(len(pieces_BT), -1)
        self.model.get_decoder()(input_ids=torch.cat((start, pieces_BT), dim=1), past_key_values=state)
        if kind == REPEAT:
            ids_BT = torch.cat((prompt_BT, pieces_BT), dim=1)
            hidden_BTD = self.model.get_decoder()(input_ids=ids_BT[:, :-1], past_key_values=state).last_hidden_state
            said_BN, hidden_BND = pieces_BT, hidden_BTD[:, prompt_BT.shape[1] - 1 :]
        else:
            said_BN, hidden_BND = sampled_tokens(
                self.model, prompt_BT, state, self.answer_tokens, self.temperature, generator, self.ends
            )
            ids_BT = torch.cat((prompt_BT, said_BN), dim=1)
        is_end_BN = torch.isin(said_BN, torch.tensor(sorted(self.ends), dtype=torch.long, device=said_BN.device))
        is_target_BN = is_end_BN.cumsum(1) - is_end_BN.long() == 0
        return Lesson(kind, ids_BT, prompt_BT.shape[1], is_target_BN, hidden_BND.clone())

    def teacher_state(self, batch_size: int) -> FamState:
        """Return what the teacher begins a piece with: a reading that has read nothing."""
        state: FamState = self.model.init_state(batch_size)
        if self.hides_memory:
            state.config = state.config.replace(fam_key_bias=CLOSED)
        return state
