"""The share of the gap: how much of what full attention gains over a window a memory of the same bytes gains."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from transformerfam.errors import TransformerFamError
from transformerfam.reports.losses import LOSS, Interval, bootstrap, means_of, sums_of
from transformerfam.reports.rows import Row

TASK = "gap_share"
LEAST_GAP = 0.03
"""Nats per token that full attention must gain over the window for a share to count."""


class Gap(NamedTuple):
    """A text measured with three systems that were trained alike.

    Attributes:
        fam: loss with the memory, nats per token.
        bswa: loss of a window of the same bytes.
        full: loss of full attention.
        gain: by how much the memory is better than the window, `bswa - fam`.
        gap: by how much full attention is, `bswa - full`.
        share: `gain / gap`; 0: the memory is worth no more than its bytes as a window; 1: as good as full attention.
    """

    fam: float
    bswa: float
    full: float
    gain: Interval
    gap: Interval
    share: Interval

    @property
    def counts(self) -> bool:
        """Whether the gap is large enough for its share to mean something."""
        return self.gap.mean >= LEAST_GAP


def gap_of(fam: Iterable[Row], bswa: Iterable[Row], full: Iterable[Row]) -> Gap | None:
    """Return the gap over the documents that all three have measured; None where there are none.

    Rows are those of `fam evaluate documents`; intervals come from resampling documents, all three together.
    """
    sums = [sums_of(rows, LOSS) for rows in (fam, bswa, full)]
    shared = sorted(set.intersection(*(set(of_system) for of_system in sums)))
    sums_D32 = torch.tensor([[of_system[key] for of_system in sums] for key in shared], dtype=torch.float64)
    if not shared or not bool((sums_D32[..., 1] > 0).all()):
        return None

    def losses(totals: Tensor) -> tuple[Tensor, ...]:
        return means_of(totals).unbind(dim=-1)

    def gain(totals: Tensor) -> Tensor:
        own, window, _ = losses(totals)
        return window - own

    def gap(totals: Tensor) -> Tensor:
        _, window, whole = losses(totals)
        return window - whole

    fam_loss, bswa_loss, full_loss = (loss.item() for loss in losses(sums_D32.sum(dim=0)))
    return Gap(
        fam=fam_loss,
        bswa=bswa_loss,
        full=full_loss,
        gain=bootstrap(sums_D32, gain),
        gap=bootstrap(sums_D32, gap),
        share=bootstrap(sums_D32, lambda totals: gain(totals) / gap(totals)),
    )


def gap_rows(rows: Iterable[Row], systems: Mapping[str, str], least_place: int = 1024) -> list[dict[str, Any]]:
    """Return a row for every text that three systems have measured.

    Args:
        rows: of `fam evaluate documents`.
        systems: of "fam", "bswa" and "full", how the rows call each: `MODEL, SYSTEM`, or the system alone.
        least_place: parts of documents that begin before this token are left out.

    Raises:
        TransformerFamError: a system has no rows.
    """
    chosen = [row for row in rows if row["task"] == "documents" and row["first_token"] >= least_place]
    named: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in chosen:
        named[f"{row['model']}, {row['system']}", row["system"]].append(row)
    by_system = {}
    for part, name in systems.items():
        meant = [names for names in named if name in names]
        if len(meant) != 1:
            known = ", ".join(sorted(full for full, _ in named))
            raise TransformerFamError(f"--{part} is {name!r}, required is one of {known or 'the systems of the rows'}")
        by_system[part] = named[meant[0]]
    found = []
    for text, digest, questions in sorted({_text_of(row) for row in chosen}):
        own = {
            part: [row for row in rows_of if _text_of(row) == (text, digest, questions)]
            for part, rows_of in by_system.items()
        }
        gap = gap_of(own["fam"], own["bswa"], own["full"])
        if gap is None:
            continue
        first = {part: rows_of[0] for part, rows_of in own.items()}
        found.append(
            {
                "task": TASK,
                "text": text,
                "text_digest": digest,
                "loss_fam": gap.fam,
                "loss_bswa": gap.bswa,
                "loss_full": gap.full,
                "gain": list(gap.gain),
                "gap": list(gap.gap),
                "share": list(gap.share),
                "counts": gap.counts,
                "state_bytes": first["fam"]["state_bytes"],
                "state_bytes_bswa": first["bswa"]["state_bytes"],
                **{name: first["fam"].get(name) for name in ("fam_length", "num_memory_segments")},
                "systems": dict(systems),
                **{f"weights_{part}": row.get("weights") for part, row in first.items()},
            }
        )
    return found


def _text_of(row: Row) -> tuple[str, str, str]:
    """Return what is the same in rows of one text, and of one way to measure it."""
    return row["text"], row["text_digest"], row["questions"]


def gap_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a line for every text."""
    table = Table(
        title="share of the gap (losses in nats per token)",
        caption=f"[95 % interval over documents]; a share counts where the gap is at least {LEAST_GAP}",
        box=SIMPLE_HEAD,
    )
    for name in ("text", "FAM", "window", "full", "window - FAM", "window - full", "share", "bytes", "window's"):
        table.add_column(name, justify="left" if name == "text" else "right")
    for row in rows:
        share = Interval(*row["share"]).shown(is_signed=True)
        table.add_row(
            row["text"],
            *(f"{row[name]:.3f}" for name in ("loss_fam", "loss_bswa", "loss_full")),
            *(Interval(*row[name]).shown(is_signed=True) for name in ("gain", "gap")),
            share if row["counts"] else "gap too small",
            *(f"{row[name]:,}" for name in ("state_bytes", "state_bytes_bswa")),
        )
    return table
