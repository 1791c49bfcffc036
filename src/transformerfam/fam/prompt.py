"""Change what a memory starts from: a text as prompt, a prefix in the prompt's place, the saved FAM of a reading."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from transformerfam.decoder.arguments import as_tensor, check_ids
from transformerfam.decoder.half_precision import fitting
from transformerfam.errors import TransformerFamError
from transformerfam.fam.initial import initial_fam
from transformerfam.fam.memory import FamMemory, change_config, memory_of


def _require_prompt(memory: FamMemory) -> None:
    length = memory.config.fam_length
    if length == 0 or memory.config.fam_init != "prompt":
        raise TransformerFamError(
            f"fam_init is {memory.config.fam_init!r} and fam_length {length}, required is a prompt of at least one row"
        )


@torch.no_grad()
def prefix_from_prompt(model: PreTrainedModel) -> None:
    """Replace the prompt of a converted model by the prefix that it makes, in place; the model reads as before.

    A prompt's rows come out of the layers nearly alike. As a prefix, each layer's rows can be trained apart. Where the
    first residual is zero only their directions act, and they are scaled to root mean square 1, so that one learning
    rate suits all layers.

    Raises:
        TransformerFamError: there is no prompt, or the memory has slots.

    Source: B.1, prompt tuning and prefix tuning.
    """
    memory = memory_of(model)
    _require_prompt(memory)
    if memory.config.has_slots:
        raise TransformerFamError(
            "fam_feeds is 'slots', required for a prefix is another, since rows go up from a prompt"
        )
    rows_LFD = torch.cat(initial_fam(model.get_decoder()))
    config = memory.config
    if config.fam_residual == "none" or (config.fam_residual == "previous" and config.zero_first_residual):
        rows_LFD = rows_LFD / rows_LFD.pow(2).mean(-1, keepdim=True).sqrt()
    del memory.prompt
    memory.prefix = nn.Parameter(rows_LFD.clone())
    change_config(model, fam_init="prefix")


@torch.no_grad()
def set_prompt(model: PreTrainedModel, token_ids: Sequence[int]) -> None:
    """Let the prompt of a converted model begin as the embeddings of a text's last tokens, in place.

    Rows that begin as words of a question look for its answer from the first step on. (PEFT's
    prompt tuning has the same start; the paper says nothing of it.)

    Args:
        model: converted, with `fam_init="prompt"`.
        token_ids: of the text, at least `fam_length`.

    Raises:
        TransformerFamError: there is no prompt, or too few tokens for its rows.
    """
    memory = memory_of(model)
    length = memory.config.fam_length
    _require_prompt(memory)
    if len(token_ids) < length:
        raise TransformerFamError(
            f"the text has {len(token_ids)} tokens, required are at least fam_length ({length}); give a longer text"
        )
    ids = as_tensor("token_ids", token_ids, "ids of a text")
    check_ids(ids, model.get_input_embeddings().weight.shape[0])
    rows = ids[-length:].to(memory.prompt.device)
    memory.prompt.copy_(model.get_input_embeddings()(rows))


@torch.no_grad()
def personal_memory(model: PreTrainedModel, fam_LFD: torch.Tensor) -> list[nn.Parameter]:
    """Let a converted model start every reading from a saved FAM, and train that alone, in place.

    The saved FAM becomes the prefix, whose residual counts from the first update on, since it holds context. All other
    weights are frozen. What a task or a person needs can so be trained into `L * F * D` numbers.

    Args:
        model: converted.
        fam_LFD: `(L, F, D)`, as `state.fams[:, 0]`.

    Returns:
        The only trained parameters.

    Raises:
        TransformerFamError: `fam_LFD` has another shape, or numbers that are not finite.

    Source: B.2.3, "the saved FAM can also be used as a trained prefix for a task or a person".
    """
    memory = memory_of(model)
    if not bool(torch.isfinite(fam_LFD).all()):
        raise TransformerFamError("the saved FAM has numbers that are not finite; take state.fams[:, 0] of a reading")
    if memory.config.has_slots:
        raise TransformerFamError(
            "fam_feeds is 'slots', where a saved FAM is keys and values and no prefix of hidden states; required for a "
            "personal memory is another fam_feeds"
        )
    shape = (len(memory.layouts), memory.config.fam_length, model.get_input_embeddings().weight.shape[1])
    if tuple(fam_LFD.shape) != shape:
        raise TransformerFamError(
            f"the saved FAM has shape {tuple(fam_LFD.shape)}, required is (layers, fam_length, hidden_size) {shape}; "
            "take state.fams[:, 0] of the same model"
        )
    for name in [name for name, _ in memory.named_parameters()]:
        delattr(memory, name)
    model.requires_grad_(False)
    weight = model.get_input_embeddings().weight
    memory.prefix = nn.Parameter(fitting(fam_LFD.to(weight.device), weight.dtype, copy=True))
    change_config(model, fam_init="prefix", zero_first_residual=False)
    return [memory.prefix]
