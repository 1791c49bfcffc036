"""The tools that people already use, on a converted model: Trainer, pipeline, save and load, quantised weights."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import make_tiny_llama, random_ids
from tiny_models import make_passkey_model
from torch.utils.data import Dataset
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from transformerfam import FamConfig, convert, from_pretrained
from transformerfam.fam.convert import fam_parameters

CONFIG = FamConfig(fam_key_bias=0.0, block_size=8, fam_length=3, num_memory_segments=1)


# Newer transformers has another name for it, and warns of the old one.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
CHECKPOINTED = {CHECKPOINTING: True}


def enable_checkpoints(model: Any) -> None:
    getattr(model, f"{CHECKPOINTING}_enable")()


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Random texts of more than two blocks, with labels."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = random_ids(21, seed=index)
        return {"input_ids": ids, "labels": ids}


def train(folder: Path, model: Any, resume: str | None = None, **options: Any) -> list[float]:
    """Train four steps with transformers' Trainer and return the losses."""
    set_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no"} | options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Texts())
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_trains_the_memory_with_and_without_checkpoints(tmp_path: Path) -> None:
    """Catches activations computed again from a state that has moved on, and a prompt that gets no gradient."""
    plain, checkpointed = (convert(make_tiny_llama(), CONFIG) for _ in range(2))
    before = fam_parameters(plain)[0].detach().clone()
    losses = train(tmp_path / "plain", plain)
    again = train(tmp_path / "checkpointed", checkpointed, **CHECKPOINTED)
    assert losses == pytest.approx(again, rel=1e-5)
    assert losses[-1] < losses[0]
    for (name, parameter), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(other, parameter, atol=1e-5, rtol=1e-4, msg=name)
    assert not torch.equal(fam_parameters(plain)[0], before)


def test_checkpoints_keep_the_state_and_not_the_activations() -> None:
    """Catches checkpoints of layers, or none: what is kept for the backward pass of one more block."""

    def kept_bytes(num_tokens: int, is_checkpointed: bool) -> int:
        model: Any = convert(make_tiny_llama(), CONFIG).train()
        if is_checkpointed:
            enable_checkpoints(model)
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = model.get_decoder()(input_ids=random_ids(1, num_tokens))
        assert output.last_hidden_state.requires_grad
        return sum(sizes.values())

    plain, checkpointed = (kept_bytes(80, flag) - kept_bytes(40, flag) for flag in (False, True))
    assert checkpointed < plain / 3


def test_trainer_in_bfloat16(tmp_path: Path) -> None:
    """Catches keys of another type than the queries under autocast."""
    full = train(tmp_path / "float32", convert(make_tiny_llama(), CONFIG))
    mixed = train(tmp_path / "bfloat16", convert(make_tiny_llama(), CONFIG), bf16=True, **CHECKPOINTED)
    assert mixed == pytest.approx(full, rel=0.02)
    assert mixed != full


@pytest.mark.parametrize("lengths", [(21,), (8, 13), (5, 3, 13)])
def test_state_behind_checkpointed_blocks_goes_on(lengths: tuple[int, ...]) -> None:
    """Catches keys of a block that were let go and are still needed."""
    ids = random_ids(2, sum(lengths))
    found = []
    for is_checkpointed in (False, True):
        model: Any = convert(make_tiny_llama(), CONFIG).train()
        if is_checkpointed:
            enable_checkpoints(model)
        state = model.init_state(2)
        logits = [model(input_ids=part, past_key_values=state).logits for part in ids.split(list(lengths), dim=1)]
        with torch.no_grad():
            logits.append(model(input_ids=random_ids(2, 9, seed=1), past_key_values=state).logits)
        found.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(found[1], found[0])


@torch.no_grad()
def test_saved_model_loads_converted_and_elsewhere_as_its_base(tmp_path: Path) -> None:
    """Catches a memory that is left out, or a base model that can no longer be loaded without this package."""
    model = convert(make_tiny_llama(), CONFIG)
    fam_parameters(model)[0].normal_()
    model.save_pretrained(tmp_path)
    ids = random_ids(1, 30)
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is LlamaForCausalLM
    assert loaded.fam_config == CONFIG
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    again = from_pretrained(tmp_path / "again", kind=LlamaForCausalLM, dtype=torch.float32)
    assert torch.equal(again.read(ids).fams, model.read(ids).fams)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)  # which importing this package does not change
    assert torch.equal(base(input_ids=ids).logits, make_tiny_llama()(input_ids=ids).logits)
    assert not hasattr(AutoModel.from_pretrained(tmp_path), "fam")
    code = (
        "import sys, torch\nfrom safetensors.torch import save_file\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "assert not hasattr(model, 'read') and 'transformerfam' not in sys.modules\n"
        f"logits = model(torch.tensor({ids.tolist()})).logits\n"
        f"save_file({{'logits': logits}}, {str(tmp_path / 'logits')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert torch.equal(load_file(tmp_path / "logits")["logits"], base(input_ids=ids).logits)


def test_adapter_that_is_missing_beside_its_model_is_refused(tmp_path: Path) -> None:
    convert(make_tiny_llama(), CONFIG).save_pretrained(tmp_path)
    (tmp_path / "fam.safetensors").unlink()
    with pytest.raises(OSError, match=r"fam\.safetensors"):
        from_pretrained(tmp_path)


def test_trainer_goes_on_from_its_checkpoint_with_the_memory(tmp_path: Path) -> None:
    """Catches a memory that a resumed training starts from scratch."""
    whole, first = (convert(make_tiny_llama(), CONFIG) for _ in range(2))
    options: dict[str, Any] = {"save_steps": 2, "save_strategy": "steps"}
    losses = train(tmp_path / "whole", whole)
    train(tmp_path / "parts", first, **options)
    resumed = convert(make_tiny_llama(seed=3), CONFIG)
    rest = train(tmp_path / "parts", resumed, resume=str(tmp_path / "parts" / "checkpoint-2"), **options)
    assert rest[-2:] == pytest.approx(losses[2:], rel=1e-5)
    torch.testing.assert_close(fam_parameters(resumed)[0], fam_parameters(whole)[0])


def test_pipeline_generates_what_generate_does() -> None:
    """Catches a pipeline that takes the class, not the model, for what it is."""
    model, tokenizer = make_passkey_model()
    text = "The grass is green. The sky is blue. " * 3
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    encoded = tokenizer(text, return_tensors="pt")
    new_ids = model.generate(**encoded, **options)[0, encoded.input_ids.shape[1] :]
    expected = tokenizer.decode(new_ids, skip_special_tokens=True)
    assert pipe(text, return_full_text=False, **options)[0]["generated_text"] == expected
    both = pipe([text, text[:37]], return_full_text=False, batch_size=2, **options)
    assert both[0][0]["generated_text"] == expected


@pytest.mark.slow
def test_quantized_base_reads_saves_and_generates() -> None:
    """Catches weights that are no plain tensors: in conversion's probes, in a state's fingerprint, in generation."""
    torchao = Path(sys.prefix) / "torchao"
    if not torchao.is_dir():
        pytest.skip("torchao is not in the environment; make setup puts it there")
    script = Path(__file__).parents[1] / "quantized.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(torchao), str(script.parent)])}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
