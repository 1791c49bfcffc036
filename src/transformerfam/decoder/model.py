"""A model with a memory as a type checker sees it; its class stays that of transformers.

Of the class's own attributes the protocol has those that every decoder of transformers has. Where a function wants the
class itself, `typing.cast(PreTrainedModel, model)` says that it is one.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import nn

from transformerfam.decoder.reading import Progress
from transformerfam.decoder.state import ReadingState

State = TypeVar("State", bound=ReadingState)


class ModelWithMemory(Protocol[State]):
    """A decoder with a language-model head and a memory; `State` is what its readings are."""

    config: Any
    generation_config: Any
    training: bool

    # With the memory

    def read(
        self,
        input_ids: torch.Tensor | Sequence[int] | Iterable[Any],
        state: State | None = None,
        attention_mask: torch.Tensor | None = None,
        progress: bool | Progress = False,
    ) -> State:
        """Read tokens of any number into a state; see `decoder.reading.read`."""

    def init_state(self, batch_size: int = 1, *args: Any, **kwargs: Any) -> State:
        """Start a reading."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Give logits `(B, T, V)` and the state, which may come as `past_key_values` or as `cache`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do the same without the hooks of the model."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, from a state or a text."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Write the model to a folder."""

    # Of the class

    @property
    def device(self) -> torch.device:
        """Where its first parameter is."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of its parameters."""

    def get_decoder(self) -> Any:
        """Return the decoder, without head."""

    def get_input_embeddings(self) -> Any:
        """Return the embedding."""

    def get_output_embeddings(self) -> Any:
        """Return the head."""

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Give embedding and head another number of tokens."""

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Choose an attention back end."""

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Compute blocks again in the backward pass."""

    def gradient_checkpointing_disable(self) -> None:
        """Keep the activations of blocks."""

    def num_parameters(self, *args: Any, **kwargs: Any) -> int:
        """Return the number of parameters."""

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter of PEFT."""

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Choose an adapter of PEFT."""

    # Of a module

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast it."""

    def cpu(self) -> Self:
        """Move it to the CPU."""

    def cuda(self, device: Any = None) -> Self:
        """Move it to a GPU."""

    def half(self, *args: Any) -> Self:
        """Cast it to float16."""

    def bfloat16(self) -> Self:
        """Cast it to bfloat16."""

    def float(self, *args: Any) -> Self:
        """Cast it to float32."""

    def double(self) -> Self:
        """Cast it to float64."""

    def eval(self) -> Self:
        """Leave training mode."""

    def train(self, mode: bool = True) -> Self:
        """Enter training mode."""

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze or free all parameters."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """Call a function on every module."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Go through the parameters."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Go through the parameters with their names."""

    def buffers(self, recurse: bool = True) -> Iterator[torch.Tensor]:
        """Go through the buffers."""

    def modules(self) -> Iterator[nn.Module]:
        """Go through the modules."""

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Go through the modules with their names."""

    def get_submodule(self, target: str) -> nn.Module:
        """Return a module by its name."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return all tensors by name."""

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Take tensors by name."""

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Have a function called after every forward."""
