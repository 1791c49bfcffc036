"""LoRA on FAM rows alone: against the reference, by any way PEFT offers, and what it refuses."""

import copy
import dataclasses
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fast_path import GRADIENT_TOLERANCE, LOGITS_TOLERANCE, assert_near, take_gradients, turned
from tiny_llama import VOCABULARY, make_tiny_llama, random_ids, random_rows

from transformerfam import FamConfig, convert
from transformerfam.config import UPDATE_PRESETS
from transformerfam.errors import TransformerFamError
from transformerfam.fam.compiled import compile_decoding, compile_reading
from transformerfam.fam.convert import fam_parameters
from transformerfam.fam.row_lora import leading_rows
from transformerfam.reference.fam import ReferenceWeights, run_reference
from transformerfam.reference.layer import LayerWeights
from transformerfam.weights.adapter import FamAdapter
from transformerfam.weights.peft_adapters import inject_lora, merge_lora

SHAPE: dict[str, Any] = {"block_size": 5, "fam_length": 2, "num_memory_segments": 1, "fam_key_bias": 0.0}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PARTS = dict(
    zip(("query_HKxD", "key_GKxD", "value_GKxD", "output_DxHK", "gate_IxD", "up_IxD", "down_DxI"), TARGETS, strict=True)
)
every_preset = pytest.mark.parametrize("preset", UPDATE_PRESETS)


def make_model(preset: str = "gated", targets: list[str] = TARGETS, **changes: Any) -> Any:
    """Convert a tiny model, with LoRA on its rows alone, all of it drawn."""
    model: Any = convert(make_tiny_llama(), FamConfig.preset(preset, **SHAPE | {"fam_lora": "rows"} | changes))
    inject_lora(model, peft.LoraConfig(r=3, lora_alpha=6.0, target_modules=targets))
    draw(model)
    return model


def draw(model: Any) -> None:
    with torch.no_grad():
        for rows in fam_parameters(model):
            rows.copy_(random_rows(*rows.shape, seed=1))
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.2 * random_rows(*parameter.shape, seed=seed))


def weights_of(model: Any) -> ReferenceWeights:
    """View base weights, and the same with LoRA added."""

    def added(layer: Any, weights: LayerWeights) -> LayerWeights:
        modules = {name.rsplit(".")[-1]: module for name, module in layer.named_modules()}
        merged = {}
        for part, target in PARTS.items():
            module = modules[target]
            product = module.lora_B["default"].weight @ module.lora_A["default"].weight
            merged[part] = getattr(weights, part) + module.scaling["default"] * product
        return dataclasses.replace(weights, **merged)

    weights = ReferenceWeights.from_llama(model)
    layers = tuple(map(added, model.model.layers, weights.layers))
    return dataclasses.replace(weights, lora_of_rows=dataclasses.replace(weights, layers=layers))


@every_preset
@pytest.mark.parametrize("back_end", ["fam", "eager"])
def test_rows_have_lora_and_tokens_the_base_weights(preset: str, back_end: str) -> None:
    """Catches a token that LoRA reaches, a row that it does not, and a gradient that is lost."""
    model, ids = make_model(preset), random_ids(17)
    model.set_attn_implementation(back_end)
    weighting = random_rows(17, VOCABULARY, seed=5)
    state = model.init_state()
    logits = torch.cat([model(input_ids=part[None], past_key_values=state).logits[0] for part in ids.split([7, 3, 7])])
    (logits * weighting).sum().backward()
    gradients = take_gradients(model)
    initial = fam_parameters(model)[0]
    result = run_reference(weights_of(model), model.fam_config, ids, initial=initial, dtype=torch.float64)
    assert_near(logits, result.logits, LOGITS_TOLERANCE, "logits")
    assert_near(state.fams[:, 0], turned(model, result.fams[-1]), LOGITS_TOLERANCE, "FAM")
    (result.logits * weighting).sum().backward()
    required = take_gradients(model)
    floor = 0.01 * max(float(gradient.abs().max()) for gradient in required.values())
    assert sum("lora_" in name and bool(gradient.any()) for name, gradient in gradients.items()) > 0
    for name, gradient in required.items():
        if model.get_parameter(name).requires_grad:
            assert_near(gradients[name], gradient, GRADIENT_TOLERANCE, f"gradient of {name}", floor)


@torch.no_grad()
def test_any_way_into_peft_is_bound() -> None:
    """Catches LoRA that a user's own call of PEFT puts on tokens, and a second adapter that comes later."""
    expected, ids = make_model(), random_ids(1, 17)
    logits = expected(input_ids=ids).logits
    model: Any = convert(make_tiny_llama(), expected.fam_config)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6.0, target_modules=TARGETS))
    draw(model)
    torch.testing.assert_close(wrapped(input_ids=ids).logits, logits)
    plain = convert(make_tiny_llama(), expected.fam_config)
    for rows, drawn in zip(fam_parameters(plain), fam_parameters(model), strict=True):
        rows.copy_(drawn)
    with wrapped.disable_adapter():
        torch.testing.assert_close(wrapped(input_ids=ids).logits, plain(input_ids=ids).logits)
    wrapped.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=6.0, target_modules=[*TARGETS]))
    wrapped.set_adapter("second")
    torch.testing.assert_close(wrapped(input_ids=ids).logits, plain(input_ids=ids).logits)  # its product is zero
    with pytest.raises(TransformerFamError, match="cannot be merged into weights that tokens use"):
        wrapped.merge_and_unload()


@torch.no_grad()
@pytest.mark.parametrize("fields", [{"use_dora": True}, {"use_rslora": True}], ids=str)
def test_other_forms_of_lora_are_peft_s_own(fields: dict[str, Any]) -> None:
    """Catches a form of LoRA that is taken for the plain one: every row alone must give what PEFT gives."""
    model: Any = convert(make_tiny_llama(), FamConfig.preset("gated", **SHAPE, fam_lora="rows"))
    inject_lora(model, peft.LoraConfig(r=3, target_modules=TARGETS, **fields))
    draw(model)
    layer, rows = model.model.layers[0].mlp.up_proj, random_rows(2, 4, 32)
    expected, plain = layer(rows), layer.base_layer(rows)
    assert not torch.allclose(expected, plain)
    model.init_state()
    with leading_rows(3):
        found = layer(rows)
    torch.testing.assert_close(found[:, :3], expected[:, :3])
    torch.testing.assert_close(found[:, 3:], plain[:, 3:])


@torch.no_grad()
def test_saved_memory_stays_apart_from_the_weights(tmp_path: Path) -> None:
    """Catches a folder whose LoRA is loaded on all tokens, or merged."""
    model, ids = make_model(), random_ids(1, 17)
    FamAdapter.from_model(model).save_pretrained(tmp_path)
    found: Any = FamAdapter.from_pretrained(tmp_path).apply(make_tiny_llama(), merge=True)
    torch.testing.assert_close(found(input_ids=ids).logits, model(input_ids=ids).logits)
    assert any("lora_A" in name for name, _ in found.named_parameters())
    torch.testing.assert_close(copy.deepcopy(found)(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(TransformerFamError, match="fam_lora is 'rows'.*cannot be merged"):
        merge_lora(found)


def test_memory_is_saved_beside_lora_of_rows_by_peft(tmp_path: Path) -> None:
    """Catches a memory among PEFT's `modules_to_save` taken for a layer in which rows cannot be distinguished."""
    ids = random_ids(2, 17)
    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["fam"], "init_lora_weights": False}

    def converted() -> Any:
        return convert(make_tiny_llama(), FamConfig.preset("gated", **SHAPE | {"fam_lora": "rows"}))

    model = peft.get_peft_model(converted(), peft.LoraConfig(r=3, **options))
    draw(model.get_base_model())
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert any("fam.modules_to_save.default.prompt" in name for name in trained)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(converted(), tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(TransformerFamError, match="cannot be merged into weights that tokens use"):
        model.merge_and_unload()


@torch.no_grad()
def test_compiled_steps_are_the_same() -> None:
    """Catches a graph in which the rows of another piece have LoRA."""
    plain, compiled = make_model(num_memory_segments=0), make_model(num_memory_segments=0)
    compile_decoding(compiled, backend="eager")
    compile_reading(compiled, backend="eager")
    ids = random_ids(1, 33)
    states = [plain.init_state(), compiled.init_state()]
    for piece in ids.split([20, 1, 1, 1, 1, 1, 1, 7], dim=1):
        expected, found = (
            m(input_ids=piece, past_key_values=s).logits for m, s in zip((plain, compiled), states, strict=True)
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_checkpointed_blocks_have_the_same_gradients() -> None:
    """Catches blocks that are computed again without their rows."""
    grads = []
    for is_checkpointed in (False, True):
        model = make_model().train()
        model.get_decoder().gradient_checkpointing = is_checkpointed
        model(input_ids=random_ids(2, 17), labels=random_ids(2, 17, seed=1)).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for parameter, expected in grads[0].items():
        torch.testing.assert_close(grads[1][parameter], expected, atol=1e-6, rtol=1e-4)


def test_rows_of_one_thread_are_not_those_of_another() -> None:
    """Catches rows that another thread's pass has in front."""
    model = make_model()
    model.init_state()
    layer, rows = model.model.layers[0].mlp.up_proj, random_rows(1, 4, 32)
    found: list[torch.Tensor] = []
    with leading_rows(2):
        thread = threading.Thread(target=lambda: found.append(layer(rows)))
        thread.start()
        thread.join()
    torch.testing.assert_close(found[0], layer.base_layer(rows))


def test_lora_where_no_rows_go_is_refused() -> None:
    """Catches LoRA that would act on tokens, or on nothing, and the field without rows."""
    with pytest.raises(TransformerFamError, match=r"the adapter has a Embedding at .*embed_tokens, where FAM rows"):
        make_model(targets=["embed_tokens"]).init_state()
    with pytest.raises(TransformerFamError, match=r"the adapter has a Linear at .*lm_head, where FAM rows"):
        make_model(targets=["lm_head", "q_proj"]).init_state()
    tuned: Any = convert(make_tiny_llama(), FamConfig.preset("gated", **SHAPE, fam_lora="rows"))
    peft.get_peft_model(tuned, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    with pytest.raises(TransformerFamError, match=r"the adapter has a ModulesToSaveWrapper at .*embed_tokens"):
        tuned.init_state()
    with pytest.raises(TransformerFamError, match="fam_lora is 'rows', required is 'all' with fam_length 0"):
        FamConfig(fam_length=0, fam_lora="rows")
    assert FamConfig.preset("gated", fam_lora="rows").without_fam().fam_lora == "all"
    merged = make_model()
    merged.model.layers[0].mlp.up_proj.merge()
    with pytest.raises(TransformerFamError, match="cannot be merged"):
        merged.init_state()
    model = make_model()
    model.init_state()
    with pytest.raises(TransformerFamError, match="whose input is 2-dimensional"):
        model.model.layers[0].mlp.up_proj(random_rows(4, 32))
