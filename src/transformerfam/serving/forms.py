"""Answers in the form of OpenAI's API."""

import time
from typing import Any

from transformerfam.tasks.sampling import TokenLogprobs


class Form:
    """The bodies of one answer.

    Args:
        answer_id: its id.
        model: name of the model.
        is_chat: whether it is a chat completion.
        decode: gives the text of one token.
    """

    def __init__(self, answer_id: str, model: str, is_chat: bool, decode: Any) -> None:
        self.is_chat = is_chat
        self.decode = decode
        name = "chat.completion" if is_chat else "text_completion"
        self._common = {"id": answer_id, "object": name, "created": int(time.time()), "model": model}
        self._offset = 0

    def body(
        self, text: str, logprobs: list[TokenLogprobs] | None, finish_reason: str, usage: dict[str, Any]
    ) -> dict[str, Any]:
        """Return a whole answer."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason, "logprobs": self._logprobs(logprobs)}
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return self._common | {"choices": [choice], "usage": usage}

    def first_chunk(self) -> dict[str, Any] | None:
        """Return what a stream begins with: of a chat who speaks."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None) if self.is_chat else None

    def chunk(self, text: str, logprobs: list[TokenLogprobs] | None) -> dict[str, Any]:
        """Return a piece of an answer."""
        said: dict[str, Any] = {"delta": {"content": text}} if self.is_chat else {"text": text}
        return self._chunk(said | {"logprobs": self._logprobs(logprobs)}, None)

    def last_chunk(self, finish_reason: str) -> dict[str, Any]:
        """Return what says how an answer ended."""
        return self._chunk({"delta": {}} if self.is_chat else {"text": ""}, finish_reason)

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return what says how many tokens there were."""
        return self._chunks() | {"choices": [], "usage": usage}

    def _chunks(self) -> dict[str, Any]:
        return self._common | ({"object": "chat.completion.chunk"} if self.is_chat else {})

    def _chunk(self, said: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "logprobs": None, "finish_reason": finish_reason} | said
        return self._chunks() | {"choices": [choice]}

    def _logprobs(self, found: list[TokenLogprobs] | None) -> dict[str, Any] | None:
        if found is None:
            return None
        if self.is_chat:
            return {"content": [self._named(one.token, one.logprob) | self._top(one) for one in found], "refusal": None}
        texts = [self.decode(one.token) for one in found]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in found],
            "top_logprobs": [{self.decode(token): value for token, value in one.top} for one in found],
            "text_offset": offsets,
        }

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.decode(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode(errors="replace"))}

    def _top(self, one: TokenLogprobs) -> dict[str, Any]:
        return {"top_logprobs": [self._named(token, value) for token, value in one.top]}
