"""`fam demo`: its text, its status, and what it counts."""

from command_line import run
from transformers import DynamicCache

from transformerfam import FamConfig, convert
from transformerfam.cli import demo
from transformerfam.decoder.cache_argument import as_cache
from transformerfam.training.recipe.sections import ModelSection
from transformerfam.training.tiny import build_tiny_model
from transformerfam.weights.models import load_model


def test_demo_that_does_not_recall_ends_with_status_1(folder):
    """Would catch a demo that looks green whatever the model says."""
    text = run("demo", "--model", folder, "--tokens", 300, "--seed", 4, status=1)
    assert "FAM did not recall the key" in text
    for part in ("seed 4", "FAM", "BSWA", "peak resident memory", "tokens/s", "key/value cache of full attention"):
        assert part in text


def test_demo_that_recalls_ends_with_status_0(folder, monkeypatch):
    """Would catch a status that depends on BSWA, or on nothing."""
    answers = {}
    prepare = demo.prepare_demo
    monkeypatch.setattr(demo, "prepare_demo", lambda *a: answers.setdefault("demo", prepare(*a)))
    monkeypatch.setattr(demo, "greedy_tokens", lambda *a: demo.torch.tensor([answers["demo"].answer_ids]))
    assert "yes" in run("demo", "--model", folder, "--tokens", 300, "--seed", 4)


def test_demo_text_holds_page_key_and_rest_in_order(folder, monkeypatch):
    """Would catch a key that is never read, or read again at the end."""
    monkeypatch.setattr(demo, "memory_notes", lambda name: {"proven_prefix_tokens": 60, "proven_filler_tokens": 400})
    made = demo.prepare_demo(str(folder), seed=2)
    _, tokenizer = load_model(folder)
    text = tokenizer.decode(made.piece(0, made.num_tokens))
    assert made.num_tokens == 400
    assert 0 < len(made.page_ids) <= 60
    assert text.count(f"The pass key is {made.key}. Remember it. {made.key} is the pass key.") == 1
    pieces = [made.piece(start, 8) for start in range(0, 400, 8)]
    assert demo.torch.cat(pieces).equal(made.piece(0, 400))


def test_demo_seed_draws_key(folder):
    """Would catch a demo that cannot be repeated, or that always hides the same key."""
    keys = [demo.prepare_demo(str(folder), seed, 200).key for seed in (1, 1, 2)]
    assert keys[0] == keys[1] != keys[2]


def test_full_attention_cache_is_counted_as_transformers_allocates_it():
    """Would catch query heads counted for key heads."""
    section = ModelSection(
        base="tiny-random", num_hidden_layers=2, hidden_size=16, num_attention_heads=2, num_key_value_heads=1
    )
    plain, cache = build_tiny_model(section, 60), DynamicCache()
    plain(demo.torch.zeros(1, 9, dtype=demo.torch.long), **as_cache(cache))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert demo.full_cache_bytes(convert(plain, FamConfig(block_size=4, fam_length=1)), 9, plain.dtype) == held


def test_peak_memory_is_that_of_this_process():
    """Would catch kilobytes reported as bytes."""
    demo.reset_peak_memory()
    assert 50e6 < demo.peak_memory() < 1e12
