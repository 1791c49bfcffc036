"""How fast are other memories that can be installed? Reading with the same width, depth, heads and segment length.

The peers make logits of all tokens and cannot leave them out, so FAM is timed with its logits too.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.harness import Row, alternate, peak_bytes_of, ratios, row, spread
from benchmarks.models import base_model, converted, random_tokens

SEGMENT_LENGTH, NUM_MEMORIES, NUM_TOKENS = 512, 16, 8192
Reader = Callable[[torch.Tensor], Any]


def _segments(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return ids.split(SEGMENT_LENGTH, dim=1)


def infini(shape: dict[str, int]) -> Reader:
    from infini_transformer_pytorch import InfiniTransformer

    model = InfiniTransformer(ff_mult=shape.pop("ff_mult"), **shape).eval()

    def read(ids: torch.Tensor) -> Any:
        memories = None
        for segment in _segments(ids):
            _, _, memories = model(segment, past_memories=memories, return_new_memories=True)
        return memories

    return read


def recurrent_memory(shape: dict[str, int]) -> Reader:
    from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer

    model = RecurrentMemoryTransformer(
        num_memory_tokens=NUM_MEMORIES, seq_len=SEGMENT_LENGTH, causal=True, num_residual_streams=1, **shape
    ).eval()

    def read(ids: torch.Tensor) -> Any:
        memories = past = None
        for segment in _segments(ids):
            _, memories, past = model(segment, memories, xl_memories=past)
        return memories

    return read


def titans(shape: dict[str, int]) -> Reader:
    from titans_pytorch import MemoryAsContextTransformer

    model = MemoryAsContextTransformer(
        segment_len=SEGMENT_LENGTH,
        num_longterm_mem_tokens=NUM_MEMORIES,
        num_residual_streams=1,
        neural_memory_layers=(shape["depth"] // 2,),
        **shape,
    ).eval()
    return model  # takes a text of any length at once, and cuts it into segments itself


def x_transformers(shape: dict[str, int]) -> Reader:
    from x_transformers import Decoder, TransformerWrapper

    width = {"dim": shape["dim"], "depth": shape["depth"], "heads": shape["heads"]}
    layers = Decoder(attn_dim_head=shape["dim_head"], ff_mult=shape["ff_mult"], rel_pos_bias=True, **width)
    model = TransformerWrapper(
        num_tokens=shape["num_tokens"], max_seq_len=SEGMENT_LENGTH, max_mem_len=SEGMENT_LENGTH, attn_layers=layers
    ).eval()

    def read(ids: torch.Tensor) -> Any:
        memories = None
        for segment in _segments(ids):
            _, memories = model(segment, mems=memories, return_mems=True)
        return memories

    return read


PEERS: dict[str, tuple[str, Callable[[dict[str, int]], Reader]]] = {
    "infini-transformer-pytorch": ("infini_transformer_pytorch", infini),
    "recurrent-memory-transformer-pytorch": ("recurrent_memory_transformer_pytorch", recurrent_memory),
    "titans-pytorch": ("titans_pytorch", titans),
    "x-transformers": ("x_transformers", x_transformers),
}


@torch.no_grad()
def run(model: str = "random_8m", repeats: int = 5, quick: bool = False) -> Iterator[Row]:
    """Read the same tokens with every peer that is installed, and with FAM, in turn."""
    if model != "random_8m":
        return  # the peers train from scratch: a pre-trained model cannot be read with them
    config = base_model(model).config
    reader = converted(
        model, block_size=SEGMENT_LENGTH, fam_length=NUM_MEMORIES, num_memory_segments=0, fam_norm_bound=None
    )
    ids = random_tokens(model, 2 * SEGMENT_LENGTH if quick else NUM_TOKENS)

    def read_with_logits(ids: torch.Tensor) -> Any:
        state = reader.init_state()
        for segment in _segments(ids):
            reader(input_ids=segment, past_key_values=state)
        return state

    readers: dict[str, Reader] = {"fam": read_with_logits, "fam without logits": reader.read}
    for package, (module, build) in PEERS.items():
        shape = {
            "num_tokens": config.vocab_size,
            "dim": config.hidden_size,
            "depth": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "dim_head": config.head_dim,
            "ff_mult": 4,
        }
        try:
            readers[package] = build(shape)
        except ImportError as error:
            missing = error.name if error.name and error.name.split(".")[0] != module else package
            yield row("peers", system=package, skipped=f"{missing} is not installed: pip install {package}")
        except (TypeError, AssertionError, RuntimeError) as error:
            yield row("peers", system=package, skipped=f"its newest version does not run: {error}")
    for package in list(readers):
        try:
            readers[package](ids[:, : 2 * SEGMENT_LENGTH])
        except Exception as error:  # whatever way a peer fails, the others continue
            del readers[package]
            yield row("peers", system=package, skipped=f"its newest version does not run: {error}")
    seconds = alternate({name: lambda read=read: read(ids) for name, read in readers.items()}, repeats)
    for name, times in seconds.items():
        yield row(
            "peers",
            system=name,
            model=model,
            num_tokens=ids.shape[1],
            block_size=SEGMENT_LENGTH,
            fam_length=NUM_MEMORIES,
            **spread("tokens_per_second", [ids.shape[1] / s for s in times]),
            **spread("ratio", ratios(times, seconds["fam"])),
            bytes_peak=peak_bytes_of(lambda read=readers[name]: read(ids)),
        )
