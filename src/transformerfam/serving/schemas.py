"""The bodies of requests: OpenAI's fields, and those of memories. What is not served is refused, not left out."""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError, model_validator

from transformerfam.serving.errors import ApiError, invalid
from transformerfam.tasks.sampling import LARGEST_SEED

Text = Annotated[str, Field(max_length=200)]
NAME_TEXT = Annotated[str, Field(min_length=1, max_length=200)]

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "web_search_options": (),
}
"""OpenAI's fields that are not served, each with the values that change nothing."""


class StreamOptions(BaseModel):
    """`stream_options`."""

    include_usage: StrictBool = False


class AnswerBody(BaseModel):
    """Fields that completions and chat completions share."""

    model_config = ConfigDict(extra="allow")

    model: str
    memory: Text | None = None
    memory_update: StrictBool | None = None
    max_tokens: StrictInt | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: StrictInt | None = Field(None, ge=-LARGEST_SEED, le=LARGEST_SEED)
    stop: str | list[str] | None = None
    stream: StrictBool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        """The stop texts."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @model_validator(mode="after")
    def _refuse_what_is_not_served(self) -> Self:
        extra = self.model_extra or {}
        for name, neutral in NEUTRAL.items():
            if extra.get(name) is not None and extra[name] not in neutral:
                raise ValueError(f"{name} is not served; leave it out")
        if len(self.stops) > 4 or any(not stop or len(stop) > 1000 for stop in self.stops):
            raise ValueError("stop is at most 4 texts of 1 to 1,000 characters; shorten it")
        return self


class CompletionBody(AnswerBody):
    """`POST /v1/completions`."""

    prompt: str | list[StrictInt] | list[str] | list[list[StrictInt]]
    logprobs: StrictInt | None = Field(None, ge=0, le=5)


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """Its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    def plain(self) -> dict[str, str]:
        """Return what a chat template takes."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}


class ChatBody(AnswerBody):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: StrictInt | None = Field(None, ge=1)
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = Field(None, ge=0, le=20)


class MemoryOptions(BaseModel):
    """What a new memory is to be, in a body or in the query of a streamed text."""

    model_config = ConfigDict(extra="forbid")

    name: NAME_TEXT | None = None
    ttl_seconds: int | None = Field(None, ge=1, le=10**10)
    keep_text: bool = False
    allow_unknown: bool = False


class MemoryBody(MemoryOptions):
    """`POST /v1/memories` in JSON; without a text the memory is empty."""

    text: str | None = None


class AppendBody(BaseModel):
    """`POST /v1/memories/ID/append` in JSON."""

    model_config = ConfigDict(extra="forbid")

    text: str = Field(min_length=1)


class AttentionBody(BaseModel):
    """`POST /v1/memories/ID/attention`; without a text those that the memory keeps are read again."""

    model_config = ConfigDict(extra="forbid")

    text: str | None = Field(None, min_length=1)
    first_block: StrictInt = Field(0, ge=0)
    num_blocks: StrictInt = Field(64, ge=1)
    layers: StrictBool = False


class ForkBody(BaseModel):
    """`POST /v1/memories/ID/fork`."""

    model_config = ConfigDict(extra="forbid")

    name: NAME_TEXT | None = None


class ChangeBody(BaseModel):
    """`PATCH /v1/memories/ID`: what is left out stays; null takes a name or an end away."""

    model_config = ConfigDict(extra="forbid")

    name: NAME_TEXT | None = None
    ttl_seconds: int | None = Field(None, ge=1, le=10**10)


Body = TypeVar("Body", bound=BaseModel)


def checked(kind: type[Body], values: Any) -> Body:
    """Return a body of a kind.

    Raises:
        ApiError: 400, with the first field that is wrong.
    """
    if not isinstance(values, dict):
        raise invalid("the body is no JSON object, required is one; send the fields as an object")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in kind.model_fields)
        message = str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            param, message = str(first["loc"][-1])[:100], "there is no such field"
        where = f"{param}: " if param else ""
        raise ApiError(400, f"{where}{message}; correct the request", "invalid_value", param or None) from error
