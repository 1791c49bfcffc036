"""Recipes that train in seconds, for the tests of training."""

from transformerfam.training.recipe.toml import build_recipe

SMALL_TRAINING = """
[model]
base = "tiny-random"
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2

[fam]
block_size = 16
fam_length = 2
num_memory_segments = 0

[schedule]
steps = 3
batch_size = 2
threads = 1
checkpoint_blocks = false

[[schedule.curriculum]]
filler_tokens = [8, 32]
"""
"""A recipe file for a model of two narrow layers, to which sections can be added."""


def small_values(**sections):
    """Return the values of a recipe for a model of two narrow layers; `sections` change it."""
    values = {
        "model": {
            "base": "tiny-random",
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 48,
        },
        "fam": {"block_size": 16, "fam_length": 4, "num_memory_segments": 0, "fam_norm_bound": 5.0},
        "optimizer": {"warmup_steps": 2},
        "schedule": {
            "steps": 6,
            "batch_size": 3,
            "curriculum": [{"filler_tokens": [1, 30], "max_steps": 3}, {"filler_tokens": [10, 60]}],
        },
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return values


def small_recipe(**sections):
    """Build the recipe of `small_values`."""
    return build_recipe(small_values(**sections))


SMALLEST_TRAINING = """
[model]
base = "tiny-random"
num_hidden_layers = 2
hidden_size = 16
num_attention_heads = 2
num_key_value_heads = 1
intermediate_size = 16
[fam]
block_size = 16
fam_length = 2
num_memory_segments = 0
[schedule]
steps = 3
batch_size = 2
curriculum = [{ filler_tokens = [1, 9] }]
"""
"""A whole recipe file."""


SMALL_COMPARISON = """
name = "small"
recipe = "training.toml"
systems = ["fam", "fam_memory_zeroed", "fam_untrained", "rmt", "full"]
seeds = [0]
num_keys = 2
batch_size = 2
filler_tokens = [8, 40]

[max_filler_tokens]
full = 8
"""
"""A whole file of a comparison, next to `training.toml`."""


ONE_STEP = """
[model]
base = "tiny"
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 64

[fam]
block_size = 16
fam_length = 2

[schedule]
steps = 1
batch_size = 2
"""
"""The beginning of a recipe file that trains the tiny tokenizer's model for a step; `schedule` is its last section."""


def one_step_on_texts(path):
    """Return a recipe file that trains so on the texts of a file."""
    return f'''{ONE_STEP}
[instructions]
files = ["{path}"]
length = 40
repeat_tokens = 0
'''
