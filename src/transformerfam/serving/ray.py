"""Replicas of a server on a Ray cluster: `serve run`, with `transformerfam.serving.ray:app` and the arguments below.

Every replica has the model, and none has a state that the store has not: whichever gets a request answers it. They
serve the routes of `fam serve`.
"""

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ByteSize, ConfigDict, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from transformerfam.errors import MissingPackageError, TransformerFamError

try:
    from ray import serve
except ImportError as error:
    raise MissingPackageError('ray is not installed; pip install "transformerfam[ray]"') from error

from transformerfam.decoder.memory import hold_weights_in
from transformerfam.serving.answers import Limits
from transformerfam.serving.app import make_app
from transformerfam.serving.keys import require_keys
from transformerfam.serving.process import log_as_json
from transformerfam.serving.ray_claims import ray_claims
from transformerfam.serving.readings import SAVE_SECONDS
from transformerfam.serving.service import SWEEP_SECONDS, Service, Settings
from transformerfam.tasks.text import read_text
from transformerfam.weights.models import find_device, load_model


class Arguments(BaseModel):
    """What a config file says under `args`; sizes in bytes or as "4GB".

    Attributes:
        store: folder that every replica sees, by its whole path, or address as "s3://BUCKET/PATH".
        model: name or folder of the model.
        name: what requests call it; None: the last part of `model`.
        memory_budget: RAM of a replica for states.
        max_batch: answers that a replica generates side by side.
        max_waiting: further answers that wait at a replica.
        max_readings: texts that a replica reads in turn.
        max_tokens: of an answer at most.
        max_upload: largest text or state.
        save_seconds: how often what was read of a text is saved.
        sweep_seconds: how often a replica looks for texts that one that is gone has not read, and deletes what is over.
        chat_template: file of a Jinja template in place of the tokenizer's.
        api_key_env: variable of the replicas' environment with the API keys, divided by spaces.
        is_open: whether requests need no key.
        device: where the model runs.
        dtype: type of its weights; None: as they are.
    """

    model_config = ConfigDict(extra="forbid")

    store: str
    model: str = "tiny"
    name: str | None = None
    memory_budget: ByteSize = ByteSize(4_000_000_000)
    max_batch: int = Field(8, ge=1, le=1024)
    max_waiting: int = Field(32, ge=0)
    max_readings: int = Field(8, ge=1, le=1024)
    max_tokens: int = Field(4096, ge=1)
    max_upload: ByteSize = ByteSize(2_000_000_000)
    save_seconds: float = Field(SAVE_SECONDS, gt=0)
    sweep_seconds: float = Field(SWEEP_SECONDS, gt=0)
    chat_template: str | None = None
    api_key_env: str = "FAM_API_KEY"
    is_open: bool = False
    device: str = "cpu"
    dtype: str | None = None

    def keys(self) -> tuple[str, ...]:
        """Return the API keys, which are never among the arguments: Ray shows those.

        Raises:
            TransformerFamError: there is none, and not everybody is let in; or one is none.
        """
        keys = require_keys(os.environ.get(self.api_key_env, "").split(), self.api_key_env)
        if not keys and not self.is_open:
            raise TransformerFamError(
                f"the environment of the replicas has no {self.api_key_env}, and without a key whoever reaches them "
                "has all memories; set it where Ray is started, or is_open: true"
            )
        return keys

    def require_shared_store(self) -> None:
        """Refuse a store that replicas would not share.

        Raises:
            TransformerFamError: it is such.
        """
        kind, _, path = self.store.rpartition("://")
        if kind == "memory" or (kind in ("", "file", "local") and not Path(path).is_absolute()):
            raise TransformerFamError(
                f"the store is {self.store!r}, which each replica would have for itself; give the whole path of a "
                "folder that all of them see, or s3://BUCKET/PATH"
            )

    def settings(self) -> Settings:
        """Return how a replica serves."""
        return Settings(
            store=self.store,
            keys=self.keys(),
            memory_budget=self.memory_budget,
            max_batch=self.max_batch,
            max_waiting=self.max_waiting,
            max_readings=self.max_readings,
            max_upload=self.max_upload,
            save_seconds=self.save_seconds,
            sweep_seconds=self.sweep_seconds,
            chat_template=None if self.chat_template is None else read_text(Path(self.chat_template)),
            limits=Limits(max_tokens=self.max_tokens, default_tokens=min(512, self.max_tokens)),
        )


class Named:
    """Say in a header of every answer which replica gave it.

    Args:
        app: what answers.
        replica: name of the replica.
    """

    def __init__(self, app: ASGIApp, replica: str) -> None:
        self.app = app
        self.header = (b"x-replica", replica.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", []).append(self.header)
            await send(message)

        await self.app(scope, receive, named)


@serve.deployment(
    name="Memories",
    max_ongoing_requests=64,
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 8},
    graceful_shutdown_timeout_s=60,
    health_check_period_s=10,
)
@serve.ingress()
class Replica:
    """One replica: the model, the engine, and the routes of `fam serve`.

    Args:
        args: of the application.
    """

    def __init__(self, args: Arguments) -> None:
        settings = args.settings()
        place = find_device(args.device)
        model, tokenizer = load_model(args.model)
        if args.dtype is not None:
            hold_weights_in(args.dtype, model)
        name = args.name or Path(args.model).name
        self.service = Service(
            model.to(place).eval(), tokenizer, name, settings, other_names=(args.model,), claims=ray_claims
        )
        log_as_json()

    def __serve_build_asgi_app__(self) -> Any:
        """Return the application, which starts and stops the service; Serve calls it."""
        application = make_app(self.service)
        application.add_middleware(Named, replica=serve.get_replica_context().replica_id.unique_id)
        return application

    def check_health(self) -> None:
        """Raise where the replica is to be replaced; Serve calls it.

        Raises:
            RuntimeError: the engine has ended.
        """
        if not self.service.is_ending and not self.service.engine.is_running:
            raise RuntimeError("the engine has ended")


def app(args: Arguments) -> Any:
    """Return the application of a config file with `import_path: transformerfam.serving.ray:app`.

    Raises:
        TransformerFamError: the store is not shared, or there is no key.
    """
    args.require_shared_store()
    args.keys()
    deployment: Any = Replica
    return deployment.bind(args)
