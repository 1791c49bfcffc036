"""The model that a recipe trains: its base, converted, with LoRA where the recipe has it."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transformerfam.adapter import inject_lora, require_peft
from transformerfam.convert import convert
from transformerfam.errors import RecipeError
from transformerfam.models import load_base, load_model
from transformerfam.training.recipe import LoraSection, Recipe
from transformerfam.training.tiny import build_tiny_model, build_tiny_tokenizer, draw_prompt


def build_trainee(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the converted model with its trainable weights, and its tokenizer.

    Raises:
        TransformerFamError: there is no such base model or memory, or it cannot be converted.
        RecipeError: the memory to start from has other LoRA than the recipe.
        MissingPackageError: LoRA without PEFT, or SmolLM2 without its package.
    """
    if recipe.model.memory is not None:
        return _load_trainee(recipe, recipe.model.memory)
    if recipe.model.base == "tiny-random":
        tokenizer: PreTrainedTokenizerBase = build_tiny_tokenizer()
        model: PreTrainedModel = build_tiny_model(recipe.model, len(tokenizer))
    else:
        model, tokenizer = load_base(recipe.model.base)
    convert(model, recipe.fam)
    if recipe.model.base == "tiny-random":
        draw_prompt(model, recipe.model.seed)
    if recipe.lora is not None:
        _add_lora(model, recipe.lora)
    return model, tokenizer


def _load_trainee(recipe: Recipe, memory: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a trained memory under the recipe's configuration, LoRA apart from the weights."""
    model, tokenizer = load_model(memory, config_overrides=recipe.fam.to_dict(), merge=False)
    loaded = getattr(model, "peft_config", {}).get("default")
    if loaded is None:
        if recipe.lora is not None:
            _add_lora(model, recipe.lora)
        return model, tokenizer
    there = (loaded.r, float(loaded.lora_alpha), sorted(loaded.target_modules))
    here = None if recipe.lora is None else (recipe.lora.rank, recipe.lora.alpha, sorted(recipe.lora.targets))
    if here != there:
        raise RecipeError(
            f"the memory in {memory} has LoRA of rank, alpha and targets {there}, the recipe has {here}; give the lora "
            "section the same values, or start without model.memory"
        )
    return model, tokenizer


def _add_lora(model: PreTrainedModel, lora: LoraSection) -> None:
    config = require_peft().LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), lora_dropout=0.0, bias="none"
    )
    inject_lora(model, config)
