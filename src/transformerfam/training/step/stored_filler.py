"""Filler that was read before: keys and values of whole blocks, by which a FAM is updated for the cost of one token."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from transformerfam.fam.memory import set_block_size
from transformerfam.training.data.sequences import SequenceBuilder
from transformerfam.training.state_passing import SavedFam


@dataclass
class StoredFiller:
    """Keys and values of N blocks of filler, without their graph.

    They belong to the weights, and to the FAM in sight, with which the blocks were read. A training that reads one of
    them again every few steps keeps them close to what its weights would make of them.
    """

    ids_NT: torch.Tensor
    """The tokens of each block."""
    keys: list[torch.Tensor]
    """Per layer `(N, G, T, K)`."""
    values: list[torch.Tensor]
    """Per layer `(N, G, T, K)`."""

    @classmethod
    def read(cls, model: PreTrainedModel, ids_NT: torch.Tensor, fam_LBFD: torch.Tensor | None = None) -> "StoredFiller":
        """Read whole blocks.

        Args:
            model: the converted model, whose block size is T, without memory segments.
            ids_NT: the blocks' tokens.
            fam_LBFD: the FAM in sight of each block; None is the initial one.
        """
        with torch.no_grad():
            state = model.init_state(len(ids_NT), fam=fam_LBFD)
            model.get_decoder()(input_ids=ids_NT.to(model.device), past_key_values=state)
        blocks = [layer.sections.block for layer in state.layers]
        keys = [layer.keys[:, :, block:].clone() for layer, block in zip(state.layers, blocks, strict=True)]
        values = [layer.values[:, :, block:].clone() for layer, block in zip(state.layers, blocks, strict=True)]
        return cls(ids_NT.clone(), keys, values)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors by name, for a checkpoint."""
        return {"ids": self.ids_NT, "keys": torch.stack(self.keys), "values": torch.stack(self.values)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], device: torch.device) -> "StoredFiller":
        """Build from what `tensors` returned, with keys and values on a device."""
        keys, values = (list(tensors[name].to(device).unbind()) for name in ("keys", "values"))
        return cls(tensors["ids"], keys, values)

    def without(
        self, index: int, length: int, places_R: torch.Tensor
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Return the first tokens of a block without some of them.

        Args:
            index: which block.
            length: how many of its tokens.
            places_R: those that are left out.

        Returns:
            The places of the others `(P,)`, and per layer their keys and values `(1, G, P, K)`.
        """
        is_left = torch.ones(length, dtype=torch.bool)
        is_left[places_R] = False
        places_P = is_left.nonzero()[:, 0]
        own = slice(index, index + 1)
        layers = zip(self.keys, self.values, strict=True)
        return places_P, [(key[own, :, places_P], value[own, :, places_P]) for key, value in layers]

    def put(self, index: int, other: "StoredFiller") -> None:
        """Replace block `index` by the only one of `other`."""
        self.ids_NT[index] = other.ids_NT[0]
        for own, new in ((self.keys, other.keys), (self.values, other.values)):
            for old_layer, new_layer in zip(own, new, strict=True):
                old_layer[index] = new_layer[0]


def keep_filler(
    stored: StoredFiller | None,
    model: PreTrainedModel,
    sequences: SequenceBuilder,
    step: int,
    saved: SavedFam | None,
) -> StoredFiller | None:
    """Read the stored filler of a recipe before a step: all of it before the first, later one block every few steps.

    Args:
        stored: what there is so far.
        model: the converted model; its block size is that of the largest block afterwards.
        sequences: what the filler is taken from.
        step: number of the step.
        saved: the FAM of the step before, the first of which is in sight of a block that is read again; None is the
            initial one.

    Returns:
        The stored filler, None where the recipe has none.
    """
    schedule = sequences.schedule
    if schedule.stored_blocks == 0:
        return None
    size = max(sequences.block_sizes)
    set_block_size(model, size)
    if stored is None:
        blocks = [StoredFiller.read(model, sequences.stored_ids(-1 - i, size)) for i in range(schedule.stored_blocks)]
        keys = [torch.cat(layer) for layer in zip(*(block.keys for block in blocks), strict=True)]
        values = [torch.cat(layer) for layer in zip(*(block.values for block in blocks), strict=True)]
        return StoredFiller(torch.cat([block.ids_NT for block in blocks]), keys, values)
    if step % schedule.steps_per_stored_block == 0:
        index = step // schedule.steps_per_stored_block % schedule.stored_blocks
        fam = None if saved is None else saved.fam_LBFD[:, :1]
        stored.put(index, StoredFiller.read(model, sequences.stored_ids(step, size), fam))
    return stored
