"""The paper's two auxiliary losses, which did not help it: for ablations.

Source: C.4 (diversity) and C.5 (reconstruction) of arXiv 2404.09173.
"""

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss
from transformers import PreTrainedModel

from transformerfam.decoder.cache_argument import cache_in
from transformerfam.decoder.served import decoder_layers, family_of, part_of
from transformerfam.decoder.state import ReadingState
from transformerfam.decoder.step import SteppedCache
from transformerfam.errors import RecipeError
from transformerfam.fam.memory import memory_of
from transformerfam.fam.piece import Piece
from transformerfam.training.recipe.data_sections import LossSection
from transformerfam.training.recipe.recipe import Recipe
from transformerfam.training.step.parts import StepPart
from transformerfam.training.step.scores import StepOutput


class AuxiliaryLosses(StepPart):
    """Look at a model's layers while they read a block, and say what the block adds to the loss.

    Diversity: the attention that a block's tokens pay to the F rows of the FAM, averaged over heads and positions, is a
    distribution over the rows, and its negative entropy is added, so that all rows come to be read. Reconstruction: the
    block's queries attend to the updated FAM alone, and what comes out is to be what attention gave in the block.
    """

    def __init__(self, model: PreTrainedModel, section: LossSection) -> None:
        """Register the hooks; `remove` takes them off.

        Raises:
            RecipeError: the model's attention does not give its weights, or its layers have no norm in front.
        """
        self.section = section
        family = family_of(model)
        if not family.has_attention_interface:
            raise RecipeError(f"loss.diversity and loss.reconstruction are not there for {family.name}; set them to 0")
        if section.diversity:
            model.set_attn_implementation("eager")  # the only back end that gives weights
        self._terms: list[torch.Tensor] = []
        self._seen: dict[int, tuple[Any, ...]] = {}
        self._handles: list[Any] = []
        config = memory_of(model).config
        for layer_idx, layer in enumerate(decoder_layers(model)):
            if not config.carries_fam(layer_idx):
                continue
            attention = part_of(layer, family.attention)
            note = functools.partial(self._after_attention, layer_idx)
            self._handles.append(attention.register_forward_hook(note, with_kwargs=True))
            if section.reconstruction:
                norm = part_of(layer, "input_layernorm")
                add = functools.partial(self._after_layer, layer_idx, attention, norm)
                self._handles.append(layer.register_forward_hook(add, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def begin(self) -> None:
        """Forget what was seen: a block begins."""
        self._terms, self._seen = [], {}

    def within(self, before: ReadingState, after: ReadingState, hidden_BTD: torch.Tensor, note: Any) -> torch.Tensor:
        """Return what the block adds, the mean over layers and sequences of each loss times its weight."""
        terms, self._terms, self._seen = self._terms, [], {}
        return torch.stack(terms).sum() if terms else hidden_BTD.new_zeros(())

    def finish(self, output: StepOutput, given: list[torch.Tensor], notes: list[Any]) -> StepOutput:
        """Add the mean over the blocks."""
        return replace(output, loss=output.loss + sum(added / len(given) for added in given))

    def _after_attention(
        self, layer_idx: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        state: Any = cache_in(kwargs)
        piece = state.step if isinstance(state, SteppedCache) else None
        if not isinstance(piece, Piece) or not torch.is_grad_enabled():
            return  # the initial FAM goes up alone
        layer = state.layers[layer_idx]
        num_layers = sum(other.fam is not None for other in state.layers)
        if self.section.diversity:
            seen = piece.phase.window_of_slots(piece.config, layer.plan, layer.sections)
            fam = slice(layer.sections.fam - seen.start, layer.sections.block - seen.start)
            share_BF = output[1][:, :, piece.num_rows :, fam].float().mean((1, 2))
            share_BF = share_BF / share_BF.sum(-1, keepdim=True).clamp(min=1e-9)
            entropy = -(share_BF * share_BF.clamp(min=1e-9).log()).sum(-1).mean()
            self._terms.append(-self.section.diversity * entropy / num_layers)
        if self.section.reconstruction and all(piece.completes) and piece.num_rows == piece.config.fam_length:
            normed = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self._seen[layer_idx] = normed, output[0], kwargs["position_embeddings"], num_layers

    def _after_layer(
        self,
        layer_idx: int,
        attention: nn.Module,
        norm: nn.Module,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        noted = self._seen.pop(layer_idx, None)
        if noted is None:
            return
        normed_BTD, attended_BTD, position_embeddings, num_layers = noted
        state: Any = cache_in(kwargs)
        updated_BFD = state.layers[layer_idx].next_fam
        length = updated_BFD.shape[1]
        rows_BTD = torch.cat((norm(updated_BFD.to(normed_BTD.dtype)), normed_BTD[:, length:]), dim=1)
        mask = rows_BTD.new_full((1, 1, rows_BTD.shape[1], rows_BTD.shape[1]), torch.finfo(rows_BTD.dtype).min)
        mask[..., :length] = 0
        again = attention(hidden_states=rows_BTD, position_embeddings=position_embeddings, attention_mask=mask)[0]
        error = mse_loss(again[:, length:], attended_BTD[:, length:].detach())
        self._terms.append(self.section.reconstruction * error / num_layers)


def auxiliary_losses(model: PreTrainedModel, recipe: Recipe) -> AuxiliaryLosses | None:
    """Return the auxiliary losses of a recipe, or None."""
    wanted = recipe.loss.diversity or recipe.loss.reconstruction
    return AuxiliaryLosses(model, recipe.loss) if wanted else None
