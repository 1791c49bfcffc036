"""Convert a model without training it, one choice at a time, and measure what the memory costs on a held-out novel.

    python scripts/measure_conversions.py --output runs/conversions_smollm2.jsonl
    python scripts/measure_conversions.py --model FOLDER --best --output runs/conversions_gemma3.jsonl

A row holds nats per token above full attention: of all tokens, and of the first 16 of a block; and the share of the
tokens' attention on FAM keys. The yardsticks are BSWA of the same block and segments, and BSWA of the same bytes of
state, whose segments are longer by the FAM's rows. Cells that are in the file already are not measured again.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.functional import cross_entropy

from transformerfam import FamConfig, convert
from transformerfam.config import UPDATE_PRESETS
from transformerfam.fam import piece as attention
from transformerfam.fam.initial import InitialFam
from transformerfam.fam.layer import FamLayer, LayerPlan, Sections
from transformerfam.fam.masks import Phase, piece_mask
from transformerfam.fam.piece import Piece
from transformerfam.fam.prompt import set_prompt
from transformerfam.reports.markdown import write_page
from transformerfam.reports.rows import RowFile
from transformerfam.tasks.novels import load_novel
from transformerfam.tasks.provenance import provenance
from transformerfam.tools.attention_record import record_attention
from transformerfam.weights.models import load_base

SHAPE = ("block_size", "num_memory_segments", "num_sink_tokens", "fam_length")
NUM_TOKENS, FIRST_TOKEN, FIRST_IN_BLOCK = 2560, 1024, 16
PROMPTS = {
    "sentence": "Here is what has been read so far: who is there, what they said and did, where and when it happened, "
    "which names and numbers were given, what was promised, what was asked and what is still open. ",
    "started_sentence": ".\nHere is what has been read so far: who is there, what they said and did, where and when. ",
    "question": "What is the name? Where did it happen? When was it? Who said so? What is the number? Why? ",
}
BASE: dict[str, Any] = UPDATE_PRESETS["gated_rows"] | {
    "block_size": 256,
    "fam_length": 16,
    "num_memory_segments": 1,
    "num_sink_tokens": 4,
}
PLAIN = {"prompt": "sentence", "is_causal_prompt": False, "rows_see_sinks": False, "rows_are_tokens": False}
SLOTS, BLOCK = (
    {name: value for name, value in UPDATE_PRESETS[preset].items() if value != BASE.get(name)}
    for preset in ("gated_slots", "gated")
)
STARTED = SLOTS | {"prompt": "started_sentence"}
ANY_SHARE = {"fam_share_threshold": 0.0}


def cells(num_layers: int) -> list[dict[str, Any]]:
    """Return the configurations, each with what differs from `BASE` and `PLAIN`."""
    found: list[dict[str, Any]] = [{}]
    for update in ("gated", "paper"):
        for query in ("initial", "previous"):
            for residual in ("initial", "previous", "none"):
                for feeds in ("next", "same"):
                    choice = {"fam_update": update, "fam_query": query, "fam_residual": residual, "fam_feeds": feeds}
                    found.append({name: value for name, value in choice.items() if value != BASE[name]})
    found += [{"num_memory_segments": m, "num_sink_tokens": sinks} for m in (0, 1, 3) for sinks in (0, 4)]
    found += [{"fam_length": length} for length in (1, 4, 8, 32, 64)]
    found += [{"block_size": 1024}, {"block_size": 1024, "fam_length": 64}, {"block_size": 512}]
    found += [{"prompt": prompt} for prompt in ("mean", "random_tokens", "first_token", "question", "text")]
    found += [{"is_causal_prompt": True}, {"is_causal_prompt": True, "num_memory_segments": 0, "num_sink_tokens": 0}]
    found += [{"fam_layers": list(range(num_layers * part // 6, num_layers))} for part in (1, 2, 3, 4, 5)]
    found += [{"fam_query_position": "written"}, {"fam_position": "fractional"}, {"num_previous_fams": 2}]
    found += [{"fam_key_bias": bias} for bias in (-1.0, -2.0, -4.0)]
    found += [SLOTS | {"prompt": prompt} for prompt in ("started_sentence", "sentence", "mean", "text")]
    slots = STARTED
    found += [slots | {"fam_share": "row"}, slots | {"fam_update": "paper"}, slots | {"fam_query_position": "written"}]
    found += [slots | {"num_memory_segments": m, "num_sink_tokens": sinks} for m in (0, 1, 3) for sinks in (0, 4)]
    found += [slots | {"fam_length": length} for length in (4, 64)] + [slots | {"block_size": 1024}]
    found += [slots | {"fam_layers": list(range(num_layers * part // 6, num_layers))} for part in (3, 5)]
    found += [{"prompt": "started_sentence"}]
    found += [{"fam_norm_bound": 1.0}, {"zero_first_residual": False, "fam_residual": "previous"}]
    found += [cell | {"rows_see_sinks": True} for cell in ({}, SLOTS, slots, SLOTS | {"prompt": "mean"})]
    found += [cell | {"rows_are_tokens": True} for cell in (slots, slots | {"rows_see_sinks": True})]
    shapes = [{"num_memory_segments": m, "num_sink_tokens": sinks} for m in (0, 1, 3) for sinks in (0, 4)]
    block = BLOCK | ANY_SHARE
    found += [block | {"prompt": prompt} | shape for prompt in ("started_sentence", "mean") for shape in shapes]
    block |= {"prompt": "started_sentence"}
    found += [block | changes for changes in ({"fam_share": "row"}, {"fam_update": "paper"}, {"prompt": "text"})]
    found += [block | {"fam_length": length} for length in (4, 64)] + [block | {"block_size": 1024}]
    found += [block | {"rows_see_sinks": True}, block | {"prompt": "mean", "rows_see_sinks": True}]
    block = BLOCK | {"prompt": "started_sentence"}
    found += [block | shape for shape in shapes] + [block | {"block_size": 1024}, BLOCK | {"prompt": "mean"}]
    found += [block | {"fam_share_threshold": threshold} for threshold in (0.25, 0.75, 0.9)]
    empty = block | {"fam_starts_empty": True}
    with_sinks = [{"num_memory_segments": m, "num_sink_tokens": 4} for m in (0, 1, 3)]
    found += [empty | shape for shape in (*with_sinks, {"num_memory_segments": 0, "num_sink_tokens": 0})]
    found += [empty | with_sinks[0] | {"fam_length": length} for length in (4, 32, 64)]
    found += [BLOCK | {"fam_starts_empty": True, "prompt": "mean"} | shape for shape in with_sinks[:2]]
    found += [slots | {"fam_starts_empty": True} | shape for shape in with_sinks[:2]]
    found += [{"fam_starts_empty": True} | shape for shape in with_sinks[:2]]
    found += [{"fam_starts_empty": True, "fam_share_threshold": 0.0} | BLOCK | with_sinks[0]]
    unique: list[dict[str, Any]] = []
    for changes in found:
        changes = {k: v for k, v in changes.items() if v != (BASE | PLAIN | ANY_SHARE).get(k, None)}
        if changes not in unique:
            unique.append(changes)
    return unique


def best_cells() -> list[dict[str, Any]]:
    """Return what cost SmolLM2 least, for another model; FAM is in every layer that takes it."""
    same_layer = {"fam_feeds": "same"}
    return [
        {},
        {"prompt": "random_tokens"},
        same_layer,
        STARTED,
        STARTED | {"rows_see_sinks": True},
        SLOTS,
        BLOCK | ANY_SHARE,
        BLOCK,
    ]


@contextlib.contextmanager
def changed_rows(given: dict[str, Any]) -> Iterator[None]:
    """Let FAM rows see the sinks, begin as evenly spaced tokens of the block, or go up in their order, as a cell says.

    Source: none; variants that are measured here and not built.
    """

    def mask_with_sinks(config: FamConfig, plan: LayerPlan, num_rows: int, phase: Phase, *rest: Any) -> torch.Tensor:
        mask = piece_mask(config, plan, num_rows, phase, *rest)
        first = phase.window_of_slots(config, plan, Sections.of(config, plan)).start
        if num_rows and first < plan.num_sink_tokens and phase.has_sinks(config, plan)[0]:
            mask[:, :, :num_rows, : plan.num_sink_tokens - first] = 0
        return mask

    def enter_with_tokens(self: Piece, layer: FamLayer, hidden_BTD: torch.Tensor) -> torch.Tensor:
        hidden_BTD = enter_layer(self, layer, hidden_BTD)
        if not (self.num_rows and self.updates and layer.is_lowest):
            return hidden_BTD
        places = torch.linspace(self.num_rows, hidden_BTD.shape[1] - 1, self.num_rows).long()
        return torch.cat((hidden_BTD[:, places], hidden_BTD[:, self.num_rows :]), dim=1)

    def causal_mask(self: InitialFam, layer: None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        mask = plain_mask(self, layer, dtype, device)
        return mask + torch.full_like(mask, torch.finfo(dtype).min).triu(1)

    enter_layer, plain_mask = Piece.enter_layer, InitialFam.mask
    with contextlib.ExitStack() as changes:
        if given["rows_see_sinks"]:
            changes.enter_context(patch.object(attention, "piece_mask", mask_with_sinks))
        if given["rows_are_tokens"]:
            changes.enter_context(patch.object(Piece, "enter_layer", enter_with_tokens))
        if given["is_causal_prompt"]:
            changes.enter_context(patch.object(InitialFam, "mask", causal_mask))
            changes.enter_context(patch.object(InitialFam, "sight", lambda self, layer: None))
        yield


def set_rows(model: Any, tokenizer: Any, prompt: str, text_ids: torch.Tensor) -> None:
    """Let the prompt begin as a cell says; `mean` is what `convert` makes."""
    length = model.fam_config.fam_length
    if prompt in PROMPTS:
        ids = tokenizer(PROMPTS[prompt] * (1 + length // 20))["input_ids"]
        set_prompt(model, ids[:length] if len(ids) >= length else ids * length)
    elif prompt == "random_tokens":
        generator = torch.Generator().manual_seed(0)
        set_prompt(model, torch.randint(len(tokenizer), (length,), generator=generator).tolist())
    elif prompt == "first_token":
        set_prompt(model, [tokenizer.bos_token_id] * length)
    elif prompt == "text":  # other text of the same book
        set_prompt(model, text_ids[0, -length:].tolist())


@torch.no_grad()
def losses(model: Any, ids: torch.Tensor, system: str) -> torch.Tensor:
    """Return every token's loss from the second on, `(T - 1,)`."""
    hidden = model.get_decoder()(input_ids=ids, use_cache=system == "fam").last_hidden_state[0]
    parts = []
    for part in torch.arange(ids.shape[1] - 1).split(512):
        logits = model.get_output_embeddings()(hidden[part]).float()
        parts.append(cross_entropy(logits, ids[0, part + 1], reduction="none"))
    return torch.cat(parts)


def table(rows: list[dict[str, Any]]) -> str:
    """Return all cells as a Markdown table, with the yardsticks next to each."""
    yardsticks = {
        (row["system"], *(row[name] for name in SHAPE[:3])): row["nats_above_full"]
        for row in rows
        if row["system"] != "fam_untrained"
    }
    lines = [
        "| what differs | nats above full attention | first 16 tokens of a block | BSWA | BSWA of the same bytes |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row["system"] != "fam_untrained":
            continue
        size, segments, sinks = (row[name] for name in SHAPE[:3])
        longer = (segments * size + 3 * row["fam_length"] // 2) // max(1, segments)
        cells = [yardsticks.get(("bswa", size, segments, sinks))]
        cells.append(yardsticks.get(("bswa_same_bytes", longer, segments, sinks)))
        shown = ["" if cell is None else f"{cell:.3f}" for cell in cells]
        changes = row["changes"].items()
        what = ", ".join(f"`{k}` {f'{v[0]} to {v[-1]}' if isinstance(v, list) else v}" for k, v in changes)
        here = [row[name] for name in ("nats_above_full", "nats_above_full_at_block_start")]
        lines.append("| " + " | ".join([what or "nothing", *(f"{value:.3f}" for value in here), *shown]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="JSON lines")
    parser.add_argument("--table", help="Markdown file for the table of all rows")
    parser.add_argument("--model", default="smollm2", help="smollm2, or the folder of another model")
    parser.add_argument("--best", action="store_true", help="measure only what costs SmolLM2 least")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--attention", action="store_true", help="measure attention on FAM keys in every cell")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.set_num_threads(options.threads)
    with RowFile(options.output) as rows:
        measured = {json.dumps(row["changes"], sort_keys=True) + row["system"] for row in rows.rows}
        base, tokenizer = load_base(options.model)
        ids = torch.tensor([tokenizer(load_novel("northanger_abbey"))["input_ids"][: NUM_TOKENS + 512]])
        ids, more = ids[:, :NUM_TOKENS], ids[:, NUM_TOKENS:]
        full = losses(base, ids, "full")
        place = torch.arange(1, NUM_TOKENS)  # of the predicted token
        wanted: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        seen = set()
        for changes in best_cells() if options.best else cells(base.config.num_hidden_layers):
            given = BASE | PLAIN | changes
            wanted.append(("fam_untrained", changes, given))
            shape = {name: given[name] for name in SHAPE[:3]}
            longer = given["num_memory_segments"] * given["block_size"] + 3 * given["fam_length"] // 2
            same_bytes = shape | {"block_size": longer // max(1, given["num_memory_segments"])}
            for system, values in (("bswa", shape), ("bswa_same_bytes", same_bytes)):
                name = json.dumps([system, values])
                if name not in seen and not (system == "bswa_same_bytes" and given["num_memory_segments"] == 0):
                    seen.add(name)
                    wanted.append((system, values, values))
        for number, (system, changes, given) in enumerate(wanted):
            if json.dumps(changes, sort_keys=True) + system in measured:
                continue
            started = time.monotonic()
            model, _ = load_base(options.model)
            values = {name: value for name, value in given.items() if name not in PLAIN}
            if system == "fam_untrained":
                convert(model, FamConfig(**values))
                if given["rows_see_sinks"]:
                    model.set_attn_implementation("eager")
                set_rows(model, tokenizer, given["prompt"], more)
            else:
                convert(model, FamConfig(**values, fam_length=0))
            with changed_rows(PLAIN | given):
                above = losses(model, ids, "fam") - full
            late = place >= FIRST_TOKEN
            begins = late & (place % given["block_size"] < FIRST_IN_BLOCK)
            row: dict[str, Any] = {
                "task": "untrained_conversion",
                "system": system,
                "model": Path(options.model).name,
                "changes": changes,
                **{
                    name: given.get(name)
                    for name in ("block_size", "num_memory_segments", "num_sink_tokens", "fam_length")
                },
                "loss_full": float(full[late].mean()),
                "nats_above_full": float(above[late].mean()),
                "nats_above_full_at_block_start": float(above[begins].mean()),
            } | provenance()
            if system == "fam_untrained" and (options.attention or not changes):
                first_block = FIRST_TOKEN // given["block_size"]
                records = [r for r in record_attention(model, ids[0]) if r.num_fam and r.block_idx >= first_block]
                keys = (
                    given["num_memory_segments"] * given["block_size"] + given["num_sink_tokens"] + given["fam_length"]
                )
                row["attention_on_fam"] = sum(record.to_fam for record in records) / len(records)
                row["uniform_share"] = records[-1].num_fam / (keys + given["block_size"] / 2)
            rows.append(row)
            seconds = time.monotonic() - started
            print(
                f"{number + 1}/{len(wanted)} {system} {changes} {row['nats_above_full']:.3f} ({seconds:.0f} s)",
                flush=True,
            )
    if options.table:
        write_page(table(rows.rows), Path(options.table))


if __name__ == "__main__":
    main()
