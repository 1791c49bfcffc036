"""The subcommand `fam demo`: a passkey on the first page of a novel, and the question for it after the last."""

import contextlib
import dataclasses
import gc
import re
import resource
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from transformerfam.cli.options import JsonOption, ModelOption
from transformerfam.cli.output import print_json, print_table
from transformerfam.cli.progress import screen, tokens_bar
from transformerfam.cli.verbosity import LEVEL
from transformerfam.errors import TransformerFamError
from transformerfam.fam.state import FamState
from transformerfam.fields import LARGEST_INTEGER
from transformerfam.tasks.filler import FILLER_SENTENCES, FillerStream
from transformerfam.tasks.novels import load_novel
from transformerfam.tasks.passkey import FIRST_KEY, LAST_KEY, PasskeyText
from transformerfam.tasks.provenance import memory_notes
from transformerfam.tasks.ragged import greedy_tokens
from transformerfam.tasks.text import encode
from transformerfam.tools.costs import full_cache_bytes
from transformerfam.weights.memories import System
from transformerfam.weights.models import load_base, load_model

NOVEL = "persuasion"
SYSTEMS: tuple[System, ...] = ("fam", "bswa")
DEFAULT_TOKENS = 8192
MOST_TOKENS = 30_000
"""What two readings take within the demo's minutes on two cores."""

Bar = Callable[[str], AbstractContextManager[Callable[[int, int | None, FamState], None]]]


@dataclass(frozen=True)
class Demo:
    """The text, the key and the question."""

    model_name: str
    seed: int
    key: int
    book: str
    """Name of the text around the key."""
    page_ids: list[int]
    """Text in front of the key."""
    intro_ids: list[int]
    """The sentences that give the key."""
    rest: FillerStream
    """Text after the key."""
    question_ids: list[int]
    answer_ids: list[int]
    num_tokens: int
    """Tokens that are read before the question."""

    def introduction(self) -> str:
        """Say what will happen."""
        return (
            f"seed {self.seed}: the key {self.key} is on the first page of {self.book}, after "
            f"{len(self.page_ids)} tokens; {self.num_tokens:,} tokens are read before the question"
        )

    def piece(self, start: int, length: int) -> torch.Tensor:
        """Return the tokens `start` to `start + length` of the text, (length,)."""
        head = torch.tensor(self.page_ids + self.intro_ids, dtype=torch.long)
        from_head = head[start : start + length]
        rest_start = max(0, start - len(head))
        return torch.cat([from_head, self.rest.slice(rest_start, length - len(from_head))])

    def pieces(self, num_tokens: int) -> Iterator[torch.Tensor]:
        """Yield the whole text, `num_tokens` of it at a time."""
        for start in range(0, self.num_tokens, num_tokens):
            yield self.piece(start, min(num_tokens, self.num_tokens - start))

    def table(self, results: dict[str, "DemoResult"]) -> Table:
        """Return a table of FAM next to BSWA."""
        table = Table(title=f"{self.model_name}, {self.num_tokens:,} tokens, key {self.key}, seed {self.seed}")
        table.add_column("", no_wrap=True)
        for system in results:
            table.add_column(system.upper(), justify="right")
        lines: tuple[tuple[str, Callable[[DemoResult], str]], ...] = (
            ("key recalled", lambda result: f"{'yes' if result.is_recalled else 'no'} ({result.answer})"),
            ("state", lambda result: decimal(result.state_bytes)),
            ("peak resident memory", lambda result: decimal(result.peak_bytes)),
            ("tokens/s", lambda result: f"{result.num_tokens / result.seconds:,.0f}"),
            ("block, memory segments, FAM", lambda result: result.shape),
            ("key/value cache of full attention", lambda result: decimal(result.cache_bytes)),
        )
        for name, show in lines:
            table.add_row(name, *(show(result) for result in results.values()))
        return table


@dataclass(frozen=True)
class DemoResult:
    """How one system did."""

    answer: str
    is_recalled: bool
    state_bytes: int
    peak_bytes: int
    """Highest resident memory of the process while this system was loaded, read and answered."""
    seconds: float
    """Of reading, without loading."""
    num_tokens: int
    shape: str
    cache_bytes: int
    """Keys and values that full attention would hold after so many tokens."""


def draw_seed() -> int:
    """Return a new seed, small enough to type."""
    return secrets.randbelow(1_000_000)


def prepare_demo(model_name: str, seed: int, num_tokens: int | None = None) -> Demo:
    """Draw a key and lay out the text.

    Args:
        model_name: "smollm2", "tiny" or a folder.
        seed: of the key and its place on the page.
        num_tokens: tokens to read; None is what the memory was proven for, at most 30,000.

    Raises:
        TransformerFamError: the model cannot be loaded, or there are too few tokens for the key.
    """
    notes = memory_notes(model_name)
    if num_tokens is None:
        num_tokens = min(MOST_TOKENS, int(notes.get("proven_filler_tokens", DEFAULT_TOKENS)))
    _, tokenizer = load_base(model_name)
    generator = torch.Generator().manual_seed(seed)
    key = int(torch.randint(FIRST_KEY, LAST_KEY + 1, (), generator=generator))
    book, text = f"the novel {NOVEL.capitalize()}", load_novel(NOVEL)
    unknown_id = getattr(tokenizer, "unk_token_id", None)
    if unknown_id is not None and encode(tokenizer, text[:2000]).count(unknown_id) > 20:
        book, text = "the paper's filler (the vocabulary has no words for a novel)", FILLER_SENTENCES
    page = first_page(text, tokenizer, int(notes.get("proven_prefix_tokens", 0)), generator)
    rest = FillerStream(encode(tokenizer, text[len(page) :]) or encode(tokenizer, text), book)
    writer = PasskeyText(tokenizer, rest)
    page_ids, intro_ids = writer.start_ids + (encode(tokenizer, page) if page else []), writer.intro_ids(key)
    least = len(page_ids) + len(intro_ids)
    if num_tokens < least:
        raise TransformerFamError(f"tokens is {num_tokens}, the key's page takes {least}; give at least so many")
    return Demo(
        model_name=model_name,
        seed=seed,
        key=key,
        book=book,
        page_ids=page_ids,
        intro_ids=intro_ids,
        rest=rest,
        question_ids=writer.question_ids,
        answer_ids=writer.key_ids(key),
        num_tokens=num_tokens,
    )


def first_page(text: str, tokenizer: Any, most_tokens: int, generator: torch.Generator) -> str:
    """Return the text in front of a place between two sentences, drawn among those within `most_tokens` tokens."""
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s)", text[: most_tokens * 8])]
    fitting = [end for end in ends if len(encode(tokenizer, text[:end])) <= most_tokens]
    if not fitting:
        return ""
    return text[: fitting[int(torch.randint(len(fitting), (), generator=generator))]]


def run_demo(demo: Demo, bar: Bar) -> dict[str, DemoResult]:
    """Read and query with FAM, then with BSWA.

    Args:
        demo: what is read.
        bar: opens a progress bar with a title and gives the function that moves it.
    """
    results: dict[str, DemoResult] = {}
    for system in SYSTEMS:
        gc.collect()
        reset_peak_memory()
        with bar(f"{system.upper()} reads") as update:
            results[system] = _run_system(demo, system, update)
    return results


@torch.no_grad()
def _run_system(demo: Demo, system: System, update: Callable[[int, int | None, FamState], None]) -> DemoResult:
    model, tokenizer = load_model(demo.model_name, system)
    state = model.init_state()

    def move(done: int, _: Any, moved: FamState) -> None:
        update(done, demo.num_tokens, moved)

    begin = time.monotonic()
    model.read(demo.pieces(model.fam_config.block_size), state, progress=move)
    seconds = time.monotonic() - begin
    num_tokens, state_bytes = state.num_tokens_read, state.num_bytes
    said = greedy_tokens(model, torch.tensor([demo.question_ids]), state, len(demo.answer_ids))[0].tolist()
    config = model.fam_config
    return DemoResult(
        answer=str(tokenizer.decode(said)).strip(),
        is_recalled=said == demo.answer_ids,
        state_bytes=state_bytes,
        peak_bytes=peak_memory(),
        seconds=seconds,
        num_tokens=num_tokens,
        shape=f"{config.block_size}, {config.num_memory_segments}, {config.fam_length}",
        cache_bytes=full_cache_bytes(model, num_tokens, model.dtype),
    )


def reset_peak_memory() -> None:
    """Start a new peak of resident memory, where the system can (Linux); elsewhere the peak is the process's."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the highest resident memory in bytes, since `reset_peak_memory` where the system can."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def demo_command(
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=LARGEST_INTEGER, help="Seed of the key; drawn if not given.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=1, max=LARGEST_INTEGER, help="Tokens to read; what the memory was proven for."),
    ] = None,
    model: ModelOption = "tiny",
    as_json: JsonOption = False,
) -> None:
    """Hide a key on the first page of a novel, read the novel, query the key: FAM next to BSWA."""
    console = Console()
    demo = prepare_demo(model, draw_seed() if seed is None else seed, tokens)
    if not as_json and not LEVEL.is_quiet:
        console.print(demo.introduction(), highlight=False)
    results = run_demo(demo, tokens_bar)
    if as_json:
        facts = {"model": model, "num_tokens": demo.num_tokens, "key": demo.key, "seed": demo.seed}
        print_json({**facts, "systems": {name: dataclasses.asdict(result) for name, result in results.items()}})
    else:
        print_table(demo.table(results))
    if not results["fam"].is_recalled:
        screen().print("[red]FAM did not recall the key[/red]")
        raise typer.Exit(1)
