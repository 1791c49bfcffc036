"""All parts of a server, put together and taken apart."""

import dataclasses
import hmac
import logging
import threading
from collections.abc import Callable
from typing import Any

from transformerfam.errors import TransformerFamError
from transformerfam.serving.answers import Answers, Limits
from transformerfam.serving.chat import ChatTemplate
from transformerfam.serving.claims import Claims
from transformerfam.serving.engine import Engine
from transformerfam.serving.errors import ApiError
from transformerfam.serving.memories import Memories
from transformerfam.serving.metrics import Metrics
from transformerfam.serving.readings import SAVE_SECONDS, Readings
from transformerfam.serving.records import owner_of
from transformerfam.serving.store import Store
from transformerfam.serving.texts import SharedTokenizer

SWEEP_SECONDS = 60.0

log = logging.getLogger("transformerfam.serving")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a server serves.

    Attributes:
        store: address of the store; see `Store`.
        keys: API keys, each with its own memories; none: whoever reaches the server has all.
        memory_budget: bytes of states in RAM at most.
        max_batch: answers that are generated side by side.
        max_waiting: further answers that wait.
        max_readings: texts that are read in turn.
        max_body: bytes of a JSON body at most.
        max_upload: bytes of a text or a state's file at most.
        slice_seconds: how long a slice of a text may hold up answers.
        save_seconds: how often what was read of a text is saved; a server that is killed loses so much reading.
        sweep_seconds: how often memories whose time is over are deleted, and texts of servers that are gone are read.
        chat_template: Jinja template in place of the tokenizer's own.
        limits: of one answer.
    """

    store: str
    keys: tuple[str, ...] = ()
    memory_budget: int = 4_000_000_000
    max_batch: int = 8
    max_waiting: int = 32
    max_readings: int = 8
    max_body: int = 8_000_000
    max_upload: int = 2_000_000_000
    slice_seconds: float = 0.25
    save_seconds: float = SAVE_SECONDS
    sweep_seconds: float = SWEEP_SECONDS
    chat_template: str | None = None
    limits: Limits = dataclasses.field(default_factory=Limits)


class Service:
    """A server without its HTTP.

    Args:
        model: converted, in evaluation mode.
        tokenizer: of the model.
        name: what requests call the model.
        settings: how it serves.
        other_names: what they may call it, too.
        claims: makes, of the store, that by which servers that share it keep one another from the same memory; None: no
            other server has the store.

    Raises:
        TransformerFamError: the store is not usable.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        settings: Settings,
        other_names: tuple[str, ...] = (),
        claims: Callable[[Store], Claims] | None = None,
    ) -> None:
        if not hasattr(model, "fam_config"):
            raise TransformerFamError("the model has no memory yet, required is a converted one; call convert(model)")
        self.name = name
        self.settings = settings
        self.store = Store(settings.store, is_shared=claims is not None)
        own_claims = None if claims is None else claims(self.store)
        shared = SharedTokenizer(tokenizer)
        self.engine = Engine(
            model,
            max_batch=settings.max_batch,
            max_waiting=settings.max_waiting,
            max_readings=settings.max_readings,
            slice_seconds=settings.slice_seconds,
        )
        self.memories = Memories(self.store, model, name, settings.memory_budget, claims=own_claims)
        self.readings = Readings(self.memories, self.engine, shared, settings.save_seconds)
        template = ChatTemplate(shared, settings.chat_template)
        self.answers = Answers(self.memories, self.engine, shared, template, settings.limits, [name, *other_names])
        self.metrics = Metrics(self.engine, self.memories)
        self.is_ending = False
        self._ended = threading.Event()

    def start(self) -> None:
        """Begin to work, and resume what the last server has not read."""
        self.engine.start()
        self.readings.resume()
        threading.Thread(target=self._sweep, name="sweep", daemon=True).start()

    def stop(self) -> None:
        """End: open answers fail, open readings are resumed by the next server, what was read is saved."""
        self.is_ending = True
        self._ended.set()
        self.engine.stop()
        self.readings.close()
        self.memories.claims.close()
        self.store.close()

    def _sweep(self) -> None:
        while not self._ended.wait(self.settings.sweep_seconds):
            try:
                self.memories.sweep()
            except ApiError as error:
                log.warning("the store was not swept: %s", error)
            self.readings.resume(rereads=False)  # what the store did not take, or a server that is gone has not read

    def owner(self, authorization: str | None) -> str:
        """Return who sends a request, by its header `Authorization`.

        Raises:
            ApiError: 401, the key is missing or is none of this server.
        """
        if not self.settings.keys:
            return owner_of("")
        kind, _, given = (authorization or "").partition(" ")
        found = None
        for key in self.settings.keys:  # all of them, so that the time says nothing
            if hmac.compare_digest(key.encode(), given.strip().encode()) and kind.lower() == "bearer":
                found = key
        if found is None:
            raise ApiError(
                401, "the API key is missing or wrong; send the header 'Authorization: Bearer KEY'", "invalid_api_key"
            )
        return owner_of(found)
