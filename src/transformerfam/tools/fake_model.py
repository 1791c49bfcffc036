"""Models of fake tensors, which have shapes and no values, and a count of the bytes that a step on them would take."""

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel

from transformerfam.config import FamConfig
from transformerfam.decoder.cache_argument import as_cache
from transformerfam.decoder.layouts import LayerLayout, inverse_frequencies
from transformerfam.decoder.positions import Turner
from transformerfam.decoder.served import decoder_layers, own_windows
from transformerfam.fam.checks import check_layers
from transformerfam.fam.convert import attach
from transformerfam.versions import require_peft


class AllocatedBytes(TorchDispatchMode):
    """Count the bytes of all tensors that are made while it is on, and the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Leave tensors out that were there before."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        return output

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes


class _Shapes(Cache):
    """Note the shapes that every layer hands to its cache."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shapes: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kw: Any
    ) -> Any:
        key, value = ((kept.shape[1], kept.shape[3]) for kept in (key_states, value_states))
        self.shapes[layer_idx] = key, value
        return key_states, value_states


def build_on_meta(config: Any, dtype: torch.dtype, training: str, lora_rank: int) -> PreTrainedModel:
    """Build a model without values; with `training` "lora" adapters are trained, with "none" nothing."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        if training == "lora":
            peft = require_peft()
            peft.inject_adapter_in_model(peft.LoraConfig(r=lora_rank, target_modules="all-linear"), model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lora_" in name)
        elif training == "none":
            model.requires_grad_(False)
    return model


def make_fake(model: PreTrainedModel) -> None:
    """Replace all parameters and buffers by fake ones on the CPU; what was one stays one."""
    fakes: dict[int, Any] = {}
    for module in model.modules():
        for named in (module._parameters, module._buffers):
            for name, old in named.items():
                if old is None:
                    continue
                if id(old) not in fakes:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    is_parameter = isinstance(old, nn.Parameter)
                    fakes[id(old)] = nn.Parameter(new, old.requires_grad) if is_parameter else new
                named[name] = fakes[id(old)]


def convert_fake(model: PreTrainedModel, fam: FamConfig) -> None:
    """Attach a memory to a model of fake tensors."""
    check_layers(fam, len(decoder_layers(model)))
    recorder, decoder, config = _Shapes(), model.get_decoder(), model.config
    with torch.no_grad():
        decoder(
            inputs_embeds=torch.zeros(1, 2, config.hidden_size, dtype=model.dtype),
            attention_mask=torch.zeros(1, 1, 2, 2, dtype=model.dtype),
            position_ids=torch.arange(2)[None],
            **as_cache(recorder),
        )
    layouts = []
    for layer_idx, window in enumerate(own_windows(config)):
        key_shape, value_shape = recorder.shapes[layer_idx]
        # Which table a layer turns by is found with values; here one that is not too wide for its keys is taken.
        table = next(table for table in inverse_frequencies(decoder.rotary_emb) if 2 * len(table) <= key_shape[1])
        layouts.append(LayerLayout(key_shape, value_shape, Turner(table), window))
    attach(model, fam, layouts)
