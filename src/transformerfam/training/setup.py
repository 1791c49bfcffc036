"""The model that a recipe trains: its base, converted, with LoRA where the recipe has it."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transformerfam.config import FamConfig
from transformerfam.decoder.memory import hold_weights_in
from transformerfam.errors import RecipeError
from transformerfam.fam.prompt import prefix_from_prompt, set_prompt
from transformerfam.tasks.provenance import memory_notes
from transformerfam.tasks.text import encode, read_text
from transformerfam.tasks.unknown_words import say_unknown
from transformerfam.training.lora import fuse_lora
from transformerfam.training.recipe.recipe import Recipe
from transformerfam.training.step.attention_outputs import AttentionOutputs
from transformerfam.training.step.lessons import LessonStore
from transformerfam.training.step.teacher import ReadsText, Teacher
from transformerfam.training.tiny import build_tiny_model, build_tiny_tokenizer, draw_prompt, frequent_words
from transformerfam.versions import require_peft
from transformerfam.weights.memories import give_memory
from transformerfam.weights.models import BASE_NOTE, load_base, load_model
from transformerfam.weights.peft_adapters import inject_lora

NUM_FREQUENT_WORDS = 2000
"""Words of `model.vocabulary_from` that the tiny model knows."""


def build_trainee(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the converted model with its trainable weights, and its tokenizer.

    Raises:
        TransformerFamError: there is no such base model or memory, or it cannot be converted.
        RecipeError: the memory to start from has another base, other LoRA or a prefix where the recipe has a prompt.
        MissingPackageError: LoRA without PEFT, or SmolLM2 without its package.
    """
    section = recipe.model
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    if section.memory is not None:
        _require_same_base(section.memory, section.base)
        model, tokenizer = _load_memory(section.memory, recipe.fam)
    elif section.base == "tiny-random":
        tokenizer = build_tiny_tokenizer(_words_of(recipe))
        model = build_tiny_model(section, len(tokenizer))
        give_memory(model, recipe.memory_config)
        draw_prompt(model, section.seed)
    else:
        model, tokenizer = load_base(section.base)
        give_memory(model, recipe.memory_config)
    if section.prompt_text is not None:
        ids = encode(tokenizer, section.prompt_text)
        set_prompt(model, ids)
        say_unknown(tokenizer, ids, "model.prompt_text")
    if getattr(model, "peft_config", None):
        _require_same_lora(model.peft_config["default"], recipe)
    elif recipe.lora is not None:
        lora = recipe.lora
        config = require_peft().LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), lora_dropout=0.0, bias="none"
        )
        try:
            inject_lora(model, config)
        except ValueError as error:  # PEFT's, of names that no layer has
            raise RecipeError(f"lora.targets is {list(lora.targets)}, which PEFT refuses ({error})") from error
    if section.dtype != "float32":
        hold_weights_in(section.dtype, model, only_frozen=True)
    if recipe.lora is not None and recipe.lora.fused and recipe.fam.fam_lora == "all":
        fuse_lora(model)
    return model, tokenizer


def build_teacher(
    recipe: Recipe, trainee: PreTrainedModel, device: torch.device | str
) -> tuple[Teacher | None, AttentionOutputs | None]:
    """Return the teacher of a recipe, and what notes the outputs of the trained model's attention.

    Where LoRA leaves the base weights as they are, the trained model itself is read as its base; where they are trained
    or sharded, the base is loaded a second time.

    Args:
        recipe: says whether there is one, and what of it.
        trainee: the model that is trained, on its device.
        device: where that is.

    Raises:
        TransformerFamError: the folder of lessons cannot be made.
    """
    loss, fam = recipe.loss, recipe.fam
    if not loss.teacher and not loss.full_attention:
        return None, None
    dtype = getattr(torch, recipe.model.dtype)
    base: str | PreTrainedModel = trainee if recipe.lora and not recipe.schedule.shard else recipe.model.base
    attention = AttentionOutputs(trainee) if loss.attention_outputs else None
    teacher = Teacher(base, device, dtype, attention=attention)
    if loss.full_attention:
        near = fam.block_size * (fam.num_memory_segments + 1)
        store = None if loss.lessons is None else LessonStore(loss.lessons, teacher.weights, dtype)
        teacher.reads_text = ReadsText(near, loss.far_context, store)
    return teacher, attention


def _words_of(recipe: Recipe) -> list[str]:
    """Return the words that the tiny model knows besides those of the passkey text."""
    section, known = recipe.model, list(recipe.data.words())
    if section.vocabulary_from is not None:
        known += frequent_words(read_text(section.vocabulary_from), NUM_FREQUENT_WORDS)
    return known


def _load_memory(memory: str, config: FamConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the memory to start from into the recipe's configuration; a prompt may continue as a prefix."""
    overrides = config.to_dict()
    del overrides["fam_init"]
    model, tokenizer = load_model(memory, config_overrides=overrides, merge=False)
    there = model.fam_config.fam_init
    if there == "prefix" and config.fam_init == "prompt":
        raise RecipeError(
            f"the memory in {memory} has a prefix, fam.fam_init is 'prompt', and no prompt makes that prefix; set "
            "fam.fam_init to 'prefix'"
        )
    if there != config.fam_init:
        prefix_from_prompt(model)
    return model, tokenizer


def _require_same_base(memory: str, base: str) -> None:
    there = memory_notes(memory).get(BASE_NOTE)
    if there is None:
        raise RecipeError(
            f"there is no memory in {memory!r} that names its base model; set model.memory to what fam train wrote"
        )
    if there != base:
        raise RecipeError(
            f"the memory in {memory} belongs to base {there!r}, model.base is {base!r}; set it to {there!r}"
        )


def _require_same_lora(loaded: Any, recipe: Recipe) -> None:
    there = (loaded.r, float(loaded.lora_alpha), sorted(loaded.target_modules))
    here = None if recipe.lora is None else (recipe.lora.rank, recipe.lora.alpha, sorted(recipe.lora.targets))
    if here != there:
        raise RecipeError(
            f"the memory in {recipe.model.memory} has LoRA of rank, alpha and targets {there}, the recipe has {here}; "
            "give the lora section the same values, or start without model.memory"
        )
