"""Mean losses over documents and their differences, with bootstrap intervals over documents."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from transformerfam.reports.rows import Row, mixed_commits, require_alike

NUM_RESAMPLES = 2000


class Part(NamedTuple):
    """Which tokens of a row are averaged.

    Attributes:
        loss: the field with their mean loss.
        num: the field with how many they are.
    """

    loss: str
    num: str


LOSS = Part("loss", "num_predicted")
BLOCK_START = Part("block_start_loss", "num_block_start")
FAR = Part("far_loss", "num_far")


class Column(NamedTuple):
    """A column of the tables.

    Attributes:
        title: of the column.
        part: which tokens of a row it averages.
        places: first tokens of the parts of documents that it is over.
    """

    title: str
    part: Part
    places: tuple[int, ...]

    def of(self, rows: Iterable[Row]) -> list[Row]:
        """Return the rows that it is over."""
        return [row for row in rows if row["first_token"] in self.places]

    def loss(self, rows: Iterable[Row]) -> "Interval | None":
        """Return the mean loss; see `mean_loss`."""
        return mean_loss(self.of(rows), self.part)

    def difference(self, rows: Iterable[Row], others: Iterable[Row]) -> "Interval | None":
        """Return by how much the mean loss of rows is above that of others; see `difference`."""
        return difference(self.of(rows), self.of(others), self.part)


def columns_of(places: Sequence[int], num_tokens: int, far_tokens: int) -> list[Column]:
    """Return the columns of a table: parts of a document, starts of blocks, and names seen long before.

    Args:
        places: first tokens of the parts.
        num_tokens: of a document.
        far_tokens: tokens since a name was last seen.
    """
    ends = [*places[1:], num_tokens]
    by_place = [Column(f"{begin:,} to {end:,}", LOSS, (begin,)) for begin, end in zip(places, ends, strict=True)]
    return [
        *by_place,
        Column("block start", BLOCK_START, tuple(places)),
        Column(f"names after {far_tokens:,}", FAR, tuple(places)),
    ]


class Interval(NamedTuple):
    """A mean, and its 95 % interval."""

    mean: float
    low: float
    high: float

    def shown(self, is_signed: bool) -> str:
        """Return it for a table; a difference with its sign."""
        sign = "+" if is_signed else ""
        return f"{self.mean:{sign}.3f} [{self.low:{sign}.3f}, {self.high:{sign}.3f}]"


def mean_loss(rows: Iterable[Row], part: Part) -> Interval | None:
    """Return the mean loss of all tokens of a part; None where there are none."""
    sums = sums_of(rows, part)
    return _bootstrapped([sums[key] for key in sorted(sums)])


def difference(rows: Iterable[Row], others: Iterable[Row], part: Part) -> Interval | None:
    """Return by how much the mean loss of rows is above that of others, on the documents and seeds that both have.

    Both are of the same tokens, so the interval is that of the difference, document by document.
    """
    own, other = sums_of(rows, part, by_seed=True), sums_of(others, part, by_seed=True)
    of_document: defaultdict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for document, seed in sorted(own.keys() & other.keys()):
        (loss, count), (other_loss, other_count) = own[document, seed], other[document, seed]
        if count and other_count:
            # Blocks of other sizes begin elsewhere, so counts may differ; the difference is that of means.
            of_document[document][0] += (loss / count - other_loss / other_count) * count
            of_document[document][1] += count
    return _bootstrapped(list(of_document.values()))


def sums_of(rows: Iterable[Row], part: Part, by_seed: bool = False) -> dict[Any, list[float]]:
    """Return the sum of losses and the number of tokens of each document, or of each document and seed."""
    found: dict[Any, list[float]] = {}
    for row in rows:
        key = (row["document"], row["seed"]) if by_seed else row["document"]
        own = found.setdefault(key, [0.0, 0.0])
        if row[part.loss] is not None:
            own[0] += row[part.loss] * row[part.num]
            own[1] += row[part.num]
    return found


def _bootstrapped(sums: Sequence[Sequence[float]]) -> Interval | None:
    """Return the mean and its interval from sums and counts, resampling documents."""
    sums_D2 = torch.tensor([pair for pair in sums if pair[1]], dtype=torch.float64)
    return bootstrap(sums_D2, means_of) if len(sums_D2) else None


def means_of(totals: Tensor) -> Tensor:
    """Return means from sums and counts, `(..., 2)`."""
    return totals[..., 0] / totals[..., 1]


def bootstrap(sums_D: Tensor, statistic: Callable[[Tensor], Tensor]) -> Interval:
    """Return a statistic with its 95 % interval, resampling documents, the same ones for every statistic.

    Args:
        sums_D: what each document adds to the totals, `(documents, ...)`.
        statistic: of the totals over documents, `(..., totals)`.
    """
    draw = torch.Generator().manual_seed(0)
    chosen_ND = torch.randint(len(sums_D), (NUM_RESAMPLES, len(sums_D)), generator=draw)
    values_N = statistic(sums_D[chosen_ND].sum(dim=1))
    low, high = torch.quantile(values_N, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(statistic(sums_D.sum(dim=0)).item(), low, high)


def cells_of(
    by_system: Mapping[str, Sequence[Row]], columns: Sequence[Column], reference: str | None = None
) -> dict[str, list[Interval | None]]:
    """Return what the columns show of every system: its loss, or the difference from that of the reference."""
    if reference is None:
        return {system: [column.loss(rows) for column in columns] for system, rows in by_system.items()}
    others = by_system[reference]
    return {
        system: [column.difference(rows, others) for column in columns]
        for system, rows in by_system.items()
        if system != reference
    }


def documents_tables(rows: Iterable[Row]) -> list[Table]:
    """Return a table of the losses for each text, and one of the differences from BSWA, or else the first system.

    Raises:
        StateMismatchError: rows of one model and system are of different weights or configurations.
    """
    known: dict[tuple[str, str, int], Row] = {}
    texts: defaultdict[tuple[str, str, str], defaultdict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    chosen = [row for row in rows if row["task"] == "documents"]
    models = {str(row["model"]) for row in chosen}
    for row in chosen:
        require_alike(row, known.setdefault((str(row["model"]), row["system"], row["seed"]), {}))
        name = row["system"] if len(models) == 1 else f"{row['model']}, {row['system']}"
        texts[row["text"], row["text_digest"], row["questions"]][name].append(row)
    found = []
    digests = {(text, digest) for text, digest, _ in texts}
    for (text, digest, _), by_system in sorted(texts.items()):
        several = len([name for name, _ in digests if name == text]) > 1
        text = f"{text} ({digest})" if several else text
        of_text = [row for own in by_system.values() for row in own]
        places = sorted({row["first_token"] for row in of_text})
        num_tokens = max(row["first_token"] + row["num_tokens"] for row in of_text)
        columns = columns_of(places, num_tokens, of_text[0]["far_tokens"])
        reference = next((system for system in by_system if system.endswith("bswa")), next(iter(by_system)))
        for title, relative in ((f"{text}: loss (nats per token)", None), (f"{text}: minus {reference}", reference)):
            cells = cells_of(by_system, columns, relative)
            if not cells:
                continue
            num_documents = len({row["document"] for row in of_text})
            caption = f"{num_documents} documents, [95 % interval over them]"
            table = Table(title=title, caption=f"{caption}; {mixed_commits(of_text)}".strip("; "), box=SIMPLE_HEAD)
            table.add_column("system", no_wrap=True)
            for column in columns:
                table.add_column(column.title, justify="right")
            for system, values in cells.items():
                shown = ("-" if value is None else value.shown(relative is not None) for value in values)
                table.add_row(escape(system), *shown)
            found.append(table)
    return found
