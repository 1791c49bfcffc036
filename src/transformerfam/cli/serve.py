"""The subcommand `fam serve`."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from transformerfam.cli.loading import load
from transformerfam.cli.options import DeviceOption, DtypeOption, ModelOption
from transformerfam.cli.output import say
from transformerfam.errors import MissingPackageError, TransformerFamError
from transformerfam.tasks.text import read_text


def parse_bytes(text: str, option: str) -> int:
    """Return a number of bytes: "4GB", "512MiB" or digits.

    Raises:
        TransformerFamError: it is none.
    """
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except (ValidationError, OverflowError) as error:
        raise TransformerFamError(f"{option} is {text!r}, required is a size such as 4GB or 512MiB") from error
    if size < 0:
        raise TransformerFamError(f"{option} is {text!r}, required is at least 0")
    return size


def serve_command(
    model: ModelOption = "tiny",
    store: Annotated[
        str, typer.Option("--store", help="Where memories are kept: a folder, s3://BUCKET/PATH, or another of fsspec.")
    ] = "fam-memories",
    memory_budget: Annotated[
        str, typer.Option("--memory-budget", help="RAM for states, for example 4GB; those used last stay there.")
    ] = "4GB",
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", envvar="FAM_API_KEY", help="A key that is let in; each has its own memories."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="What requests call the model.")] = None,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, max=1024, help="Answers side by side.")] = 8,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=0, max=100_000, help="Answers that wait; further ones get 429.")
    ] = 32,
    max_readings: Annotated[
        int, typer.Option("--max-readings", min=1, max=1024, help="Texts that are read in turn; more get 429.")
    ] = 8,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, max=1_000_000, help="Tokens of an answer at most.")
    ] = 4096,
    max_upload: Annotated[str, typer.Option("--max-upload", help="Largest text or state, for example 2GB.")] = "2GB",
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", help="Jinja template in place of the tokenizer's.")
    ] = None,
    grace_seconds: Annotated[
        float, typer.Option("--grace-seconds", min=0, max=3600, help="How long answers may end after SIGTERM.")
    ] = 30.0,
    shared: Annotated[
        bool, typer.Option("--shared", help="Share the folder of --store with other servers of this machine.")
    ] = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
) -> None:
    """Serve a model and its memories over HTTP: OpenAI's API, and /v1/memories."""
    try:
        from transformerfam.serving.answers import Limits
        from transformerfam.serving.claims import FileClaims
        from transformerfam.serving.keys import require_keys
        from transformerfam.serving.process import LOOPBACK, Server, log_as_json, open_socket
        from transformerfam.serving.service import Service, Settings
    except ImportError as error:
        raise MissingPackageError(
            f'a package of the server is not installed ({error.name}); pip install "transformerfam[serve]"'
        ) from error
    keys = require_keys(api_key or (), "--api-key")
    if not keys and host not in LOOPBACK:
        raise TransformerFamError(
            f"--host is {host}, which others reach, and no key is required of them; give --api-key KEY, or listen at "
            "127.0.0.1"
        )
    settings = Settings(
        store=store,
        keys=keys,
        memory_budget=parse_bytes(memory_budget, "--memory-budget"),
        max_batch=max_batch,
        max_waiting=max_waiting,
        max_readings=max_readings,
        max_upload=parse_bytes(max_upload, "--max-upload"),
        chat_template=None if chat_template is None else read_text(chat_template),
        limits=Limits(max_tokens=max_tokens, default_tokens=min(512, max_tokens)),
    )
    with open_socket(host, port) as listening:
        loaded, tokenizer = load(model, device=device, dtype=dtype)
        called = name or Path(model).name
        claims = FileClaims.of if shared else None
        service = Service(loaded.eval(), tokenizer, called, settings, other_names=(model,), claims=claims)
        log_as_json()
        server = Server(service, grace_seconds)
        shown = f"[{host}]" if ":" in host else host
        say(f"serving {called} at http://{shown}:{listening.getsockname()[1]}, memories in {store}; Ctrl-C ends it")
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again after a graceful end
            server.run(sockets=[listening])
