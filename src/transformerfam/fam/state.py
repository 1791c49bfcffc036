"""FamState: what a reading carries from piece to piece.

Shape suffixes of the whole package: B batch, T tokens, D hidden, H query heads, G key/value heads, K head dim,
M memory slots, F FAM rows, L layers, V vocabulary.
"""

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from transformerfam.config import FamConfig
from transformerfam.decoder.arguments import LARGEST_NUMBER
from transformerfam.decoder.identity import ModelIdentity
from transformerfam.decoder.state import ReadingState, require_several, take_stored
from transformerfam.errors import CorruptFileError, StateMismatchError, TransformerFamError
from transformerfam.fam.layer import FamLayer
from transformerfam.fam.stacked import stack_states
from transformerfam.fam.stored import num_packed_bytes, packed_tensors, stored_dtype, unpack_tensors
from transformerfam.files.tensors import load_tensors, metadata_form, refuse_to_write, require_finite, save_tensors

STATE_FORMAT_VERSION = 2
OLDER_VERSIONS = (1,)
"""Versions of files that `load` reads, too."""


class FamState(ReadingState):
    """Carry a reading of any length in constant memory; see `ReadingState`.

    Attributes:
        config: the `FamConfig` that it was made with.
        block_fill: tokens in each row's current block.
        num_blocks_per_row: whole blocks that each row has read.
        starts_from_saved_fam: per row, whether the reading began from a saved FAM, whose residual counts from the
            first update on.
        queries_key: of the weights that the layers' constant queries were made by; None where there are none.
    """

    layers: list[Any]
    why_positions_grow = "fam_position 'zero' measures every block's distance from the text's beginning"

    def __init__(
        self,
        layers: Sequence[FamLayer],
        config: FamConfig,
        identity: ModelIdentity,
        batch_size: int,
        *,
        starts_from_saved_fam: Sequence[bool] | None = None,
        position_offset: int = 0,
        queries_key: tuple[Any, ...] | None = None,
    ) -> None:
        super().__init__(layers=list(layers))
        self.config = config
        self.identity = identity
        self.block_fill = [0] * batch_size
        self.num_blocks_per_row = [0] * batch_size
        self.starts_from_saved_fam = list(starts_from_saved_fam or [False] * batch_size)
        self.position_offset = position_offset
        self.queries_key = queries_key
        self.begin_history()
        self.num_blocks_until_steady = max(layer.plan.num_blocks_until_steady(config) for layer in layers)

    # What it holds

    @property
    def text_start(self) -> int | None:
        """`position_offset` where FAM rows stay at position 0, so that each block is farther away; else None."""
        return self.position_offset if self.config.fam_length and self.config.fam_position == "zero" else None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in RAM; constant from `init_state` on, less from `compact` to the next token."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.tensors().values())

    @property
    def file_bytes(self) -> int:
        """Bytes of all tensors in a file that `save` writes: filled slots alone. Names and metadata are not counted."""
        return num_packed_bytes(self)

    @property
    def has_memory(self) -> bool:
        """Whether there is FAM, which random state passing can hand on."""
        return self.config.fam_length > 0

    @property
    def fams(self) -> torch.Tensor:
        """Every layer's FAM, `(L, B, F, D)`; layers without FAM give zeros.

        Raises:
            TransformerFamError: the configuration has no FAM.
        """
        present = [layer.fam for layer in self.layers if layer.fam is not None]
        if not present:
            raise TransformerFamError("fam_length is 0, so there is no FAM; convert with fam_length of at least 1")
        empty = torch.zeros_like(present[0])
        return torch.stack([empty if layer.fam is None else layer.fam for layer in self.layers])

    @property
    def carried(self) -> torch.Tensor:
        """The FAMs."""
        return self.fams

    @property
    def first_carried(self) -> torch.Tensor | None:
        """The first layer's FAM, or its keys."""
        layer = self.layers[0]
        return layer.keys if layer.fam is None else layer.fam

    # Copies

    def detach(self) -> "FamState":
        """Return the state without its graph, in place of it; see `ReadingState`."""
        for layer in self.layers:
            layer.query = None if layer.query is None else layer.query.detach()
        return super().detach()

    def shallow_copy(self) -> "FamState":
        """Return a new state that shares the tensors: the input of a pure block step while gradients are recorded.

        Under `torch.no_grad` use `fork()`, since the tensors are then written in place.
        """
        twin = super().shallow_copy()
        twin.layers = [copy.copy(layer) for layer in self.layers]
        twin.block_fill = list(self.block_fill)
        twin.num_blocks_per_row = list(self.num_blocks_per_row)
        twin.starts_from_saved_fam = list(self.starts_from_saved_fam)
        return twin

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "FamState":
        """Replace every tensor by `function(tensor)` and return the state."""
        for layer in self.layers:
            layer.map(function)
        return self

    def leave_inference_mode(self) -> None:
        """Make tensors usable outside of `torch.inference_mode`; see `ReadingState`."""
        super().leave_inference_mode()
        for layer in self.layers:
            if layer.query is not None and layer.query.is_inference() and not torch.is_inference_mode_enabled():
                layer.query = layer.query.clone()

    def compact(self) -> "FamState":
        """Free the slots of the block that hold no token, in place, and return the state: for a reading that is idle.

        They come back when the state reads on.
        """
        for layer in self.layers:
            layer.drop_block(max(self.block_fill))
        return self

    @classmethod
    def stack(cls, states: Sequence["FamState"]) -> "FamState":
        """Return a new state with the sequences of several, which may be at different places in their blocks.

        `select` takes sequences out again.

        Args:
            states: of one model and configuration, each of any number of sequences.

        Raises:
            TransformerFamError: there is none.
            StateMismatchError: they are of different models, configurations, types or devices, or a state was left by
                beam search.
        """
        stacked: FamState = stack_states(states)
        return stacked

    def make_room(self) -> None:
        """Give every layer's block its slots back, where `drop_complete_block` or `compact` took them."""
        for layer in self.layers:
            layer.make_room()

    def drop_complete_block(self) -> None:
        """Free the block's keys and values if all rows have completed theirs: no backward pass needs them."""
        if not any(self.block_fill):
            for layer in self.layers:
                layer.drop_block()

    def go_on_from(self, other: "FamState") -> None:
        """Take over the tensors and the place of a state of the same reading, which is not used any more."""
        super().go_on_from(other)
        self.layers = list(other.layers)
        self.block_fill, self.num_blocks_per_row = other.block_fill, other.num_blocks_per_row

    def zero_memory(self) -> "FamState":
        """Set every FAM, and the keys and values made from it, to zero: the control `fam_memory_zeroed`."""
        self.leave_inference_mode()
        for layer in self.layers:
            if layer.fam is not None:
                section = layer.keys[..., layer.sections.older_fams : layer.sections.block, :]
                layer.fam = torch.zeros_like(layer.fam)
                layer.put(layer.sections.older_fams, torch.zeros_like(section), torch.zeros_like(section))
        return self

    def swap_memory(self) -> "FamState":
        """Give every sequence the FAM of the one before it: the control `fam_memory_swapped`.

        Raises:
            TransformerFamError: there is one sequence alone.
        """
        require_several(self.batch_size)
        return self._put_fams(self.fams.roll(1, dims=1)) if self.has_memory else self

    def initial_memory(self) -> "FamState":
        """Put the initial FAM in place of this reading's: the control `fam_memory_initial`."""
        return self._put_fams(self.identity.model.init_state(self.batch_size).fams) if self.has_memory else self

    @torch.no_grad()
    def _put_fams(self, fam_LBFD: torch.Tensor) -> "FamState":
        """Put other FAMs `(L, B, F, D)` in place of the last ones, with the keys and values that they make."""
        self.leave_inference_mode()
        begun = self.identity.model.init_state(self.batch_size, fam=fam_LBFD, position_offset=self.position_offset)
        begun.num_blocks_per_row = list(self.num_blocks_per_row)
        any_ids_B1 = torch.zeros(self.batch_size, 1, dtype=torch.long, device=fam_LBFD.device)
        self.identity.model.read(any_ids_B1, begun)  # writes the FAM's keys and values
        for layer, other in zip(self.layers, begun.layers, strict=True):
            if layer.fam is not None:
                layer.fam = other.fam
                section = slice(layer.sections.fam, layer.sections.block)
                layer.put(layer.sections.fam, other.keys[..., section, :], other.values[..., section, :])
        return self

    # The contract of a transformers cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the keys and values `(B, G, T, K)` of a piece and return all that the piece sees."""
        if self.step is None:
            raise TransformerFamError("a FamState serves converted models alone; call convert(model, config) first")
        return self.step.attend(self.layers[layer_idx], key_states, value_states)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the batch rows `indices`, in that order."""
        super().batch_select_indices(indices)
        rows = indices.tolist()
        self.block_fill = [self.block_fill[row] for row in rows]
        self.num_blocks_per_row = [self.num_blocks_per_row[row] for row in rows]
        self.starts_from_saved_fam = [self.starts_from_saved_fam[row] for row in rows]
        self.map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    # Files

    def save(self, path: str | os.PathLike[str], dtype: str | None = None) -> None:
        """Write the state to a safetensors file, atomically: the slots that are filled, `file_bytes` of them.

        Args:
            path: file to write; its folder must exist.
            dtype: type of the numbers in the file, "bfloat16" for half the bytes of a float32 state; a state that is
                loaded from it has the model's type again, with what rounding lost. None keeps every bit.

        Raises:
            TransformerFamError: the folder does not exist, the disk is full, or the reading has numbers that are not
                finite; an old file is left as it was. Or there is no such type.
        """
        rounded = stored_dtype(dtype)
        metadata = {
            "kind": "state",
            "format_version": STATE_FORMAT_VERSION,
            "identity": self.identity_metadata(),
            "block_fill": self.block_fill,
            "num_blocks_per_row": self.num_blocks_per_row,
            "starts_from_saved_fam": self.starts_from_saved_fam,
            "position_offset": self.position_offset,
            "stored_dtype": dtype,
        } | self.to_store()
        tensors = packed_tensors(self, rounded)
        refuse_to_write(tensors, path)
        save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any, batch_size: int | None = None) -> "FamState":
        """Read a state that was saved on the same model.

        Args:
            path: a file that `save` wrote.
            model: the converted model that continues it.
            batch_size: refuse a state with another number of sequences; None takes any.

        Raises:
            CorruptFileError: the file is missing, foreign, damaged or of another version.
            StateMismatchError: it was made on another architecture, configuration, dtype or batch size.

        Warns:
            UserWarning: it was made on other weights of the same architecture.
        """
        if not hasattr(model, "init_state"):
            raise TransformerFamError("the model has no memory yet; call convert(model, FamConfig(...)) first")
        tensors, metadata = load_tensors(path, "state", STATE_FORMAT_VERSION, OLDER_VERSIONS)
        require_finite(tensors, path, "state")
        config: FamConfig = model.fam_config
        with metadata_form(path, "state"):
            num_rows = _num_rows(metadata)
        if batch_size is not None and num_rows != batch_size:
            raise StateMismatchError(
                f"{path} holds {num_rows} sequences, required are {batch_size}; read that many, or select() rows"
            )
        with torch.no_grad():
            state: FamState = model.init_state(num_rows)
        with metadata_form(path, "state"):
            take_stored(state, metadata, model.get_input_embeddings().weight.shape[0])
            state.read_with = state.identity.check(metadata["identity"], config, str(path))
        if max(metadata["block_fill"]) >= config.block_size:
            raise CorruptFileError(
                f"{path} has {max(metadata['block_fill'])} tokens in a block of {config.block_size}; make the state "
                "again"
            )
        places = list(zip(metadata["block_fill"], metadata["num_blocks_per_row"], strict=True))
        with torch.no_grad(), metadata_form(path, "state"):
            rounded = metadata.get("stored_dtype")
            unpack_tensors(state, tensors, places, path, None if rounded is None else str(rounded))
        state.block_fill = list(metadata["block_fill"])
        state.num_blocks_per_row = list(metadata["num_blocks_per_row"])
        state.starts_from_saved_fam = list(metadata["starts_from_saved_fam"])
        state.position_offset = metadata["position_offset"]
        return state


def _num_rows(metadata: dict[str, Any]) -> int:
    """Return how many sequences a file's state has, once their places are what places can be.

    Raises:
        ValueError: they are not.
    """
    fills, blocks, saved = (metadata[n] for n in ("block_fill", "num_blocks_per_row", "starts_from_saved_fam"))
    for number in (*fills, *blocks, metadata["position_offset"]):
        if type(number) is not int or not 0 <= number <= LARGEST_NUMBER:
            raise ValueError(f"{number!r} tokens or blocks")
    if not len(fills) == len(blocks) == len(saved) > 0 or any(type(flag) is not bool for flag in saved):
        raise ValueError(f"places of {len(fills)}, {len(blocks)} and {len(saved)} sequences")
    return len(fills)
