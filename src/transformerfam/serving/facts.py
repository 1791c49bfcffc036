"""What a server's model is and what its memory costs, beside the key/value cache of the model without it."""

from typing import Any

import torch

from transformerfam.serving.service import Service
from transformerfam.tools.costs import cache_layers


def facts_of(service: Service) -> dict[str, Any]:
    """Return what `/v1/models` says of a model besides OpenAI's fields.

    `kv_cache` lists what the base model would keep of a text: a layer group's bytes per token, and the window in tokens
    beyond which they do not grow (null: none). So of `n` tokens it keeps the sum of
    `bytes_per_token * min(n, window)`.
    """
    model = service.engine.model
    config, width = model.fam_config, int(next(model.parameters()).element_size())
    groups: dict[int | None, int] = {}
    for numbers, window in cache_layers(model):
        groups[window] = groups.get(window, 0) + numbers * width
    with torch.no_grad():
        state_bytes = model.init_state().num_bytes
    limits = service.answers.limits
    return {
        "has_chat": bool(service.answers.template.template),
        "max_tokens": limits.max_tokens,
        "max_upload": service.settings.max_upload,
        "memory": {
            "block_size": config.block_size,
            "fam_length": config.fam_length,
            "num_memory_segments": config.num_memory_segments,
            "state_bytes": state_bytes,
        },
        "kv_cache": [{"window": window, "bytes_per_token": width} for window, width in groups.items()],
    }
