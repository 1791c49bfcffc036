"""Turns of a chat as text that follows what a memory has read, whether a client sends them alone or with all before."""

import hashlib
from collections.abc import Sequence
from typing import Any

from transformerfam.serving.errors import ApiError, invalid
from transformerfam.serving.schemas import Message

MARK = "answer-7f3ac09e41"
"""Stands for an answer whose text the memory has read; what a template puts after it follows."""


def digest_of(memory: str, role: str, text: str) -> str:
    """Return what a record remembers of a message that was read."""
    return hashlib.sha256(f"{memory} {role} {text}".encode(errors="surrogatepass")).hexdigest()[:32]


def new_turns(memory: str, turns: Sequence[str], messages: Sequence[Message]) -> list[Message]:
    """Return the messages that a memory has not read: all after its own turns, where they begin the list.

    Args:
        memory: its id.
        turns: digests of the messages that it has read.
        messages: the new ones alone, or the whole chat.

    Raises:
        ApiError: 400, there is no new one, or the last is the assistant's; 409, they begin with another chat.
    """
    if messages[-1].role == "assistant":
        raise invalid("the last message is the assistant's, required is one to answer; add it", "messages")
    digests = [digest_of(memory, message.plain()["role"], message.text) for message in messages]
    if not turns:
        return list(messages)
    if digests[: len(turns)] == list(turns):
        rest = list(messages[len(turns) :])
        if not rest:
            raise invalid("the messages are those that the memory has read; add a new one", "messages")
        return rest
    if any(message.role == "assistant" for message in messages):
        same = next((i for i, pair in enumerate(zip(digests, turns, strict=False)) if pair[0] != pair[1]), len(digests))
        raise ApiError(
            409,
            f"the memory has read {len(turns)} messages of a chat, and the request's differ from message {same} on; "
            "send the new messages alone, or name a memory that has read these",
            "history_differs",
            "messages",
        )
    return list(messages)


class ChatTemplate:
    """The form in which a model was trained to chat.

    Args:
        tokenizer: of the model.
        template: a Jinja template in place of the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = template or getattr(tokenizer, "chat_template", None)

    def first(self, messages: Sequence[Message]) -> str:
        """Return the text of a chat that begins, up to where the answer does.

        Raises:
            ApiError: 400, there is no template, or it refuses the messages.
        """
        return self._rendered([message.plain() for message in messages])

    def following(self, messages: Sequence[Message]) -> str:
        """Return the text after an answer that was read, up to where the next one begins; errors as `first`."""
        before = [{"role": "user", "content": "."}, {"role": "assistant", "content": MARK}]
        whole = self._rendered(before + [message.plain() for message in messages])
        if MARK not in whole:
            raise invalid("the chat template drops former answers, so that no memory can continue a chat", "messages")
        return whole.rpartition(MARK)[2]

    def closing(self) -> str:
        """Return the text with which an answer ends, before the next turn begins; errors as `first`."""
        before = [{"role": "user", "content": "."}, {"role": "assistant", "content": MARK}]
        closed = self._rendered(before, False).rpartition(MARK)[2]
        following = self.following([Message(role="user", content=".")])
        return closed if following.startswith(closed) else ""

    def _rendered(self, messages: list[dict[str, str]], is_asked: bool = True) -> str:
        if not self.template:
            raise invalid(
                "the model has no chat template; use /v1/completions, or start the server with --chat-template FILE",
                "messages",
                "no_chat_template",
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=self.template, tokenize=False, add_generation_prompt=is_asked
                )
            )
        except Exception as error:  # whatever the template leads to
            raise invalid(
                f"the chat template refuses the messages ({error}); change their order or roles", "messages"
            ) from error
