"""The model that a recipe trains: its base, converted, with LoRA where the recipe has it."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transformerfam.adapter import inject_lora, require_peft
from transformerfam.convert import convert
from transformerfam.models import load_base
from transformerfam.training.recipe import Recipe
from transformerfam.training.tiny import build_tiny_model, build_tiny_tokenizer, draw_prompt


def build_trainee(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the converted model with its trainable weights, and its tokenizer.

    Raises:
        TransformerFamError: there is no such base model, or it cannot be converted.
        MissingPackageError: LoRA without PEFT, or SmolLM2 without its package.
    """
    if recipe.model.base == "tiny-random":
        tokenizer: PreTrainedTokenizerBase = build_tiny_tokenizer()
        model: PreTrainedModel = build_tiny_model(recipe.model, len(tokenizer))
    else:
        model, tokenizer = load_base(recipe.model.base)
    convert(model, recipe.fam)
    if recipe.model.base == "tiny-random":
        draw_prompt(model, recipe.model.seed)
    if recipe.lora is not None:
        lora = recipe.lora
        config = require_peft().LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), lora_dropout=0.0, bias="none"
        )
        inject_lora(model, config)
    return model, tokenizer
