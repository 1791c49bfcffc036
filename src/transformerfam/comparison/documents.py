"""Texts compared: the loss of predicting held-out documents, by place, and for names seen long before."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator
from rich.table import Table

from transformerfam.comparison.figures import line_style, name_missing
from transformerfam.comparison.plan import Asked, Asking, Comparison
from transformerfam.comparison.report import EMPTY, current_rows, new_table, over_seeds
from transformerfam.errors import RecipeError, TransformerFamError
from transformerfam.reports.figure import GUIDE, label_ends, new_figure, save_figure
from transformerfam.reports.losses import Column, cells_of, columns_of
from transformerfam.reports.rows import Row
from transformerfam.tasks.document_losses import BLOCK_START as NUM_START
from transformerfam.tasks.document_losses import PLACES, DocumentLosses
from transformerfam.tasks.documents import digest_of_texts
from transformerfam.tasks.ranges import Count, Integers


class DocumentsComparison(Comparison):
    """A comparison by the loss on held-out texts.

    Source: section 4.3 of arXiv 2404.09173.
    """

    lengths_key: ClassVar[str] = "places"
    parted_by: ClassVar[tuple[str, ...]] = ()

    task: Literal["documents"] = "documents"
    """What is asked."""

    texts: dict[str, str]
    """Held-out texts by the name that rows and tables have for them: a UTF-8 file, or a folder of them."""

    num_documents: Count = 50
    """Stretches of each text, each of which is read from its beginning."""

    document_tokens: Count = 18_432
    """Tokens of each."""

    places: Integers = PLACES
    """First token of each part of a document, by which losses are parted; the last part ends with the document."""

    far_tokens: Count = 1024
    """Tokens since a name was last seen, from which on it counts as far: more than any window that is compared."""

    compared_with: str = ""
    """A system from which the differences of the others are shown, document by document; the first if not given."""

    @model_validator(mode="after")
    def _require_texts(self) -> Self:
        if not self.texts:
            raise RecipeError("texts is empty, required is at least one name with a file or a folder")
        if self.compared_with and self.compared_with not in self.systems:
            raise RecipeError(
                f"compared_with is {self.compared_with!r}, required is one of systems ({', '.join(self.systems)})"
            )
        for name in self.texts:
            self.losses(name)
        return self

    @property
    def reference(self) -> str:
        """The system that the others are compared with."""
        return self.compared_with or self.systems[0]

    @property
    def lengths(self) -> tuple[int, ...]:
        """First tokens of the parts of a document."""
        return self.places

    def length_of(self, row: Row) -> int:
        """Return the first token of a row's part."""
        return int(row["first_token"])

    def lengths_of(self, system: str) -> list[int]:
        """Return the places that a system is measured at: all."""
        return list(self.places)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the texts."""
        return tuple(self.texts)

    def kind_of(self, row: Row) -> str | None:
        """Return the name of a row's text."""
        return row.get("text")

    def question_of(self, row: Row) -> tuple[int | None, ...]:
        """Return the number of a row's document."""
        return (row.get("document"),)

    @property
    def num_questions(self) -> int:
        """Documents that a run reads."""
        return self.num_documents * len(self.texts)

    def losses(self, text: str, **options: Any) -> DocumentLosses:
        """Return what measures one of the texts.

        Args:
            text: its name.
            **options: fields of it, in place of the comparison's.

        Raises:
            TransformerFamError: a number is out of its range.
        """
        names = ("num_documents", "document_tokens", "places", "far_tokens", "batch_size")
        own = {name: getattr(self, name) for name in names}
        return DocumentLosses(path=self.texts[text], text=text, model_name=self.name, **own | options)

    def asked(self, kind: str, seed: int, length: int, block_size: int) -> Asked:
        """Return the documents of a text; see `Comparison.asked`. A text that is not there is not checked."""
        try:
            fields = {"text_digest": digest_of_texts(self.texts[kind])}
        except TransformerFamError:  # rows are shown without the texts, too
            fields = {}
        return {(number,): fields for number in range(self.num_documents)}

    def require_askable(self) -> None:
        """Read the texts; see `Comparison.require_askable`."""
        for path in self.texts.values():
            digest_of_texts(path)

    def require_tokens(self, tokenizer: Any) -> None:
        """Write all documents as tokens; see `Comparison.require_tokens`."""
        for text in self.texts:
            self.losses(text).documents(tokenizer)

    def questions_digest(self, length: int) -> str:
        """Return the field `questions` of its rows."""
        return self.losses(next(iter(self.texts))).questions

    def ask(self, asking: Asking) -> Iterator[Row]:
        """Read every text; see `Comparison.ask`."""
        for number, text in enumerate(self.texts):
            finished = {(row["document"], row["first_token"]) for row in asking.answered if row["text"] == text}

            def update(done: int, total: int, state: Any, before: int = number) -> None:
                asking.update(before * total + done, len(self.texts) * total, state)

            losses = self.losses(
                text, system=asking.run.system, seed=asking.run.seed, finished=finished, progress=update
            )
            yield from losses.rows(asking.model, asking.tokenizer)

    @property
    def columns(self) -> list[Column]:
        """What the tables show of every system."""
        return columns_of(self.places, self.document_tokens, self.far_tokens)

    def rows_by_system(self, rows: Iterable[Row], text: str) -> dict[str, list[Row]]:
        """Return the rows of one text by system, none where it was not measured."""
        found: dict[str, list[Row]] = {system: [] for system in self.systems}
        for row in current_rows(self, rows):
            if row["task"] == self.task and row["text"] == text:
                found[row["system"]].append(row)
        return found

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """Return two tables for each text: the losses, and by how much they differ from the system compared with."""
        over = over_seeds(self).partition(" [")[0]
        caption = (
            f"{self.num_documents} documents of {self.document_tokens:,} tokens, [95 % interval over them]; columns: "
            f"tokens of a document, the first {NUM_START} tokens of a block, and names last seen {self.far_tokens:,} "
            "tokens ago or more"
        )
        return [
            new_table(
                f"{self.name}: {text}, {title} (nats per token), {over}",
                [column.title for column in self.columns],
                [
                    [system, *(EMPTY if value is None else value.shown(reference is not None) for value in values)]
                    for system, values in cells_of(self.rows_by_system(rows, text), self.columns, reference).items()
                ],
                caption,
            )
            for text in self.texts
            for title, reference in (("loss", None), (f"loss minus that of {self.reference}", self.reference))
        ]

    def plot(self, rows: Sequence[Row], path: str | Path) -> None:
        """Draw the difference from the system compared with, one panel a text; see `Comparison.plot`."""
        with new_figure(path, (7.2, 3.4 * len(self.texts)), len(self.texts)) as (figure, all_axes):
            for axes, text in zip(all_axes, self.texts, strict=True):
                self._draw(axes, text, self.rows_by_system(rows, text))
            save_figure(figure, path)

    def _draw(self, axes: Any, text: str, by_system: Mapping[str, Sequence[Row]]) -> None:
        lines, missing = [], [system for system, own in by_system.items() if not own]
        for number, (system, cells) in enumerate(cells_of(by_system, self.columns, self.reference).items()):
            points = [(place, cell) for place, cell in enumerate(cells) if cell is not None]
            if not points:
                continue
            places, found = zip(*points, strict=True)
            errors = [[cell.mean - cell.low for cell in found], [cell.high - cell.mean for cell in found]]
            style = line_style(system, number)
            means = [cell.mean for cell in found]
            axes.errorbar(places, means, yerr=errors, elinewidth=0.6, capsize=2, **style | {"linestyle": "none"})
            num_parts = sum(place < len(self.places) for place in places)  # the other columns have no order
            axes.plot(places[:num_parts], means[:num_parts], **style)
            (line,) = axes.plot(places[-1:], means[-1:], **style)
            lines.append((line, system))
        axes.axhline(0, **GUIDE)
        axes.set_title(f"{text}: loss minus that of {self.reference} (nats per token)", loc="left", fontsize=9)
        axes.set_xticks(range(len(self.columns)), [column.title.replace(" to ", " to\n") for column in self.columns])
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        name_missing(axes, missing, 0.02, "bottom")
        label_ends(axes, lines, axes.get_ylim())
