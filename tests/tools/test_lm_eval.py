"""The evaluation harness on converted models: exact scores, prompts of any length, and its own command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny_models import make_passkey_model
from transformers import LlamaConfig, LlamaForCausalLM

from transformerfam import FamConfig, convert
from transformerfam.errors import TransformerFamError
from transformerfam.tools.lm_eval import FamLM
from transformerfam.weights.models import load_smollm2, save_model

CONTEXT = "There is an important info hidden. The pass key is 12345. The grass is green. The sky is blue. "
CHOICES = [" The sun is yellow.", " Here we go.", " What is the pass key? The pass key is 12345"]


def ask(kind: Any, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@torch.no_grad()
def scores_by_one_forward(model: Any, ids: list[int], num_targets: int) -> tuple[float, bool]:
    log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    rows, targets = log_probs[-num_targets - 1 : -1], torch.tensor(ids[-num_targets:])
    return float(rows.gather(-1, targets[:, None]).sum()), bool((rows.argmax(-1) == targets).all())


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("system", ["fam", "bswa"])
def test_log_likelihoods_are_those_of_one_forward(folder: Path, batch_size: int, system: str) -> None:
    """Catches a context that is read into another's state, and continuations of one batch that mix."""
    lm = FamLM(str(folder), system=system, batch_size=batch_size)
    contexts = [CONTEXT * 3, "", CONTEXT]
    pairs = [(context, choice) for context in contexts for choice in CHOICES]
    found = lm.loglikelihood([ask("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    assert len({round(score, 3) for score, _ in found}) == (len(pairs) if system == "fam" else 6)  # which forgets
    for (context, choice), (score, is_likeliest) in zip(pairs, found, strict=True):
        context_ids, target_ids = lm._encode_pair(context, choice) if context else ([], lm.tok_encode(choice))
        ids = (context_ids or [lm.prefix_token_id]) + target_ids
        expected, is_expected = scores_by_one_forward(lm.model, ids, len(target_ids))
        assert score == pytest.approx(expected, rel=1e-4)
        assert is_likeliest == is_expected


def test_rolling_scores_are_those_of_one_forward_however_long(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a window that the harness's own models cut long texts into."""
    monkeypatch.setattr("transformerfam.tools.lm_eval.LOGITS_AT_ONCE", 50)
    lm = FamLM(str(folder))
    text = CONTEXT * 20
    ids = [lm.prefix_token_id, *lm.tok_encode(text)]
    assert len(ids) > 300
    (found,) = lm.loglikelihood_rolling([ask("loglikelihood_rolling", text)], disable_tqdm=True)
    assert found == pytest.approx(scores_by_one_forward(lm.model, ids, len(ids) - 1)[0], rel=1e-5)


def test_scores_of_a_wide_window_are_the_base_models() -> None:
    """Catches scores that a full forward of the plain model does not give."""
    model, tokenizer = make_passkey_model()
    base = LlamaForCausalLM(model.config).eval()
    weights = {name: value for name, value in model.state_dict().items() if ".fam." not in name}
    base.load_state_dict(weights)
    plain = LlamaForCausalLM(model.config).eval()
    plain.load_state_dict(weights)
    wide = FamConfig(fam_length=0, block_size=8, num_memory_segments=9)
    lm = FamLM(convert(plain, wide), tokenizer=tokenizer)
    ((score, _),) = lm.loglikelihood([ask("loglikelihood", CONTEXT, CHOICES[0])], disable_tqdm=True)
    context_ids, target_ids = lm._encode_pair(CONTEXT, CHOICES[0])
    assert score == pytest.approx(scores_by_one_forward(base, context_ids + target_ids, len(target_ids))[0], rel=1e-4)


def test_generating_stops_at_stop_texts(folder: Path) -> None:
    lm = FamLM(str(folder))
    request = ask("generate_until", CONTEXT * 3, {"until": [], "max_gen_toks": 24, "temperature": 0.0})
    (text,) = lm.generate_until([request], disable_tqdm=True)
    ids = torch.tensor([lm.tok_encode(CONTEXT * 3)])
    output = lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
    )
    assert text == lm.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    stop = text.split()[3]
    request = ask("generate_until", CONTEXT * 3, {"until": [stop], "max_gen_toks": 24})
    (cut,) = lm.generate_until([request], disable_tqdm=True)
    assert cut == text.split(stop)[0]


OPTIONS = (
    {},
    {"repetition_penalty": 3.0},
    {"no_repeat_ngram_size": 1},
    {"encoder_repetition_penalty": 1.5},
    {"eos_token_id": 5},
    {"prompt_lookup_num_tokens": 3},
)


@pytest.mark.parametrize("ends", [None, [2, 44]])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_generating_is_that_of_the_harness_own_model(options: dict[str, Any], ends: list[int] | None) -> None:
    """Catches options of a task that look at the context and see its last token alone, and ends that are ignored."""
    converted, tokenizer = make_passkey_model()
    torch.manual_seed(0)
    weights = {
        name: value + 0.3 * torch.randn_like(value)
        for name, value in converted.state_dict().items()
        if ".fam." not in name
    }

    def base() -> LlamaForCausalLM:
        model = LlamaForCausalLM(converted.config).eval()
        model.load_state_dict(weights)
        model.generation_config.eos_token_id = ends
        return model

    wide = FamConfig(fam_length=0, block_size=8, num_memory_segments=40)
    given = (CONTEXT, {"max_gen_toks": 10} | options)
    own = HFLM(base(), tokenizer=tokenizer, device="cpu", max_length=2048)
    expected = own.generate_until([ask("generate_until", *given)], disable_tqdm=True)
    ours = FamLM(convert(base(), wide), tokenizer=tokenizer)
    assert ours.generate_until([ask("generate_until", *given)], disable_tqdm=True) == expected


def test_bad_arguments_are_refused(folder: Path) -> None:
    for options, match in (
        ({"batch_size": "auto"}, "batch_size is 'auto', required is a number"),
        ({"system": "titans"}, "there is no system 'titans'"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"block_sizes": 3}, "FamConfig has no field 'block_sizes'; did you mean block_size?"),
    ):
        with pytest.raises(TransformerFamError, match=match):
            FamLM(str(folder), **options)
    with pytest.raises(TransformerFamError, match="there is no model 'tinny'; did you mean tiny"):
        FamLM("tinny")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"system": "bswa"}, "system is 'bswa', and pretrained is a model that is converted already; leave system out"),
        ({"block_size": 8}, "block_size is 8, and pretrained is a model"),
        ({"fam_key_biass": 8}, "fam_key_biass is 8, and pretrained is a model"),
        ({"tokenizer": None}, "tokenizer is None, required is the tokenizer of the model"),
        ({"pretrained": LlamaForCausalLM}, "pretrained is a type, required is a folder, tiny, smollm2 or a converted"),
    ],
)
def test_argument_that_a_given_model_leaves_no_room_for_is_refused(arguments: dict[str, Any], match: str) -> None:
    """Catches a comparison of systems or block sizes that scores one and the same model."""
    model, tokenizer = make_passkey_model()
    with pytest.raises(TransformerFamError, match=match):
        FamLM(**{"pretrained": model, "tokenizer": tokenizer} | arguments)


def test_given_model_keeps_its_type_and_takes_the_tokenizer_of_a_folder(folder: Path) -> None:
    """Catches a model in bfloat16 that is scored in float32, and a folder of a tokenizer taken for a tokenizer."""
    model, _ = make_passkey_model()
    lm = FamLM(model.to(torch.bfloat16), tokenizer=str(folder))
    assert lm.model.dtype == torch.bfloat16
    assert len(lm.tok_encode(CONTEXT)) > 9
    assert FamLM(model, tokenizer=str(folder), dtype="float32").model.dtype == torch.float32


SHORT_TASK = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def test_tables_of_rope_stay_as_they_are(folder: Path) -> None:
    """Catches angles that are rounded with the weights."""
    model = FamLM(str(folder), dtype="bfloat16").model
    assert model.dtype == torch.bfloat16
    assert {table.dtype for table in model.model.rotary_emb.buffers()} == {torch.float32}


@pytest.mark.slow
def test_command_line_runs_a_long_and_a_short_task(tmp_path: Path) -> None:
    """Catches a model that the harness does not find, or a prompt that is longer than anything it expects."""
    _, tokenizer = load_smollm2()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = convert(LlamaForCausalLM(config).eval(), FamConfig(block_size=32, fam_length=2, num_memory_segments=0))
    save_model(model, tokenizer, tmp_path / "model")
    rows = [{"context": CONTEXT * n, "choices": CHOICES, "answer": n % 3} for n in range(1, 5)]
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny_choices.yaml").write_text(SHORT_TASK.format(data=tmp_path / "rows.json"))
    command = [sys.executable, "-m", "transformerfam.tools.lm_eval", "run", "--model", "fam"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'}", "--tasks", "niah_single_1", "tiny_choices"]
    command += ["--include_path", str(tmp_path / "tasks"), "--limit", "2", "--batch_size", "2"]
    command += ["--metadata", '{"max_seq_lengths":[600]}', "--output_path", str(tmp_path / "results")]
    command += ["--gen_kwargs", "max_gen_toks=4"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    assert 0 <= results["tiny_choices"]["acc,none"] <= 1
    assert results["niah_single_1"]["600,none"] == 0  # a random model finds nothing


def test_text_and_tokens_that_the_harness_cannot_do_without_are_named(folder: Path) -> None:
    """Catches errors of the mask and of Python's own."""
    lm = FamLM(str(folder))
    with pytest.raises(TransformerFamError, match="a continuation has no tokens, at least one is required"):
        lm.loglikelihood([ask("loglikelihood", "The grass is green.", "")], disable_tqdm=True)
    lm.tokenizer.eos_token = None
    with pytest.raises(TransformerFamError, match="the tokenizer has no end-of-text token"):
        _ = lm.eot_token_id
