"""What happens around a layer while a piece goes through: every kind of piece overrides what it changes."""

from typing import Any

import torch


class PassingStep:
    """A step that leaves what goes through the layers as it is."""

    def enter_layer(self, layer: Any, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Return a layer's input: the residual to which attention is added."""
        return hidden_BTD

    def enter_branch(self, layer: Any, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Return what attention is made from, beside that residual: the input of the norm in front of it."""
        return hidden_BTD

    def masked_sight(self, layer: Any, mask: torch.Tensor) -> Any:
        """Return what a back end that knows `Sight` gets where a mask is needed."""
        return mask

    @property
    def wants_weights(self) -> bool:
        """Whether attention is to give its weights."""
        return False

    def note_weights(self, layer: Any, weights: torch.Tensor | None) -> None:
        """Take what attention gives as its weights."""

    def after_attention(self, layer: Any, output_BTD: torch.Tensor, factor: float) -> torch.Tensor:
        """Return what is added to the residual behind attention."""
        return output_BTD

    def leave_layer(self, layer: Any, hidden_BTD: torch.Tensor) -> None:
        """Note nothing."""
