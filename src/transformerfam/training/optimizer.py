"""The optimizer with a learning rate for each group of weights, its schedule, and the average of the weights."""

import math
from typing import Any

import torch
from torch import nn
from transformers import Adafactor, PreTrainedModel

from transformerfam.decoder.memory import memory_of
from transformerfam.training.recipe.recipe import Recipe
from transformerfam.training.recipe.sections import KeyBiasSection, OptimizerSection


def build_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the optimizer of all trained weights.

    The memory's learned rows are one group, the rest (LoRA or all) another.
    """
    section = recipe.optimizer
    prompt = memory_of(model).learned_rows
    own = {id(parameter) for parameter in prompt}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    rest_lr = recipe.lora.lr if recipe.lora is not None and recipe.lora.lr is not None else section.lr
    prompt_lr = section.lr if section.prompt_lr is None else section.prompt_lr
    groups = [{"params": rest, "lr": rest_lr, "base_lr": rest_lr}]
    if prompt:
        groups.append({"params": prompt, "lr": prompt_lr, "base_lr": prompt_lr, "weight_decay": 0.0})
    foreach = False if recipe.schedule.shard else None  # which cannot mix sharded weights with others
    return new_optimizer(groups, section, foreach)


def new_optimizer(
    groups: list[dict[str, Any]], section: OptimizerSection, foreach: bool | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer of a section for groups of weights; `foreach` is AdamW's."""
    if section.kind == "adafactor":
        return Adafactor(
            groups,
            lr=section.lr,
            beta1=section.betas[0],
            weight_decay=section.weight_decay,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
    return torch.optim.AdamW(
        groups, lr=section.lr, betas=section.betas, weight_decay=section.weight_decay, foreach=foreach
    )


FINAL_LR = 0.02
"""Share of the learning rate that a decay ends at."""


def lr_factor(section: OptimizerSection, step: int, num_steps: int) -> float:
    """Return what the learning rates are multiplied with at `step`, counted from 0."""
    warmup = min(1.0, (step + 1) / max(1, section.warmup_steps))
    if section.schedule == "constant" or step < section.decay_start:
        return warmup
    done = (step - section.decay_start) / max(1, num_steps - section.decay_start)
    left = 1 - done if section.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return warmup * (FINAL_LR + (1 - FINAL_LR) * left)


def key_bias_at(section: KeyBiasSection | None, step: int) -> float:
    """Return the bias on FAM keys at `step`; from `end_step` on it is exactly 0.0."""
    if section is None or step >= section.end_step:
        return 0.0
    done = max(0.0, (step - section.start_step) / (section.end_step - section.start_step))
    return section.start_value * (1.0 - done)


class AverageOfWeights:
    """An exponential moving average of the trainable weights, whose decay grows with the number of steps."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad} if decay else {}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the weights after step `step`, counted from 0."""
        decay = min(self.decay, (step + 1) / (step + 11))
        for name, parameter in model.named_parameters():
            if name in self.values:
                self.values[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Put the average into the model."""
        for name, parameter in model.named_parameters():
            if name in self.values:
                parameter.copy_(self.values[name])
