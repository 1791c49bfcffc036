"""Every argument of a call is treated as in transformers, or refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_llama import make_tiny_llama, random_ids
from tiny_models import make_passkey_model

from transformerfam import FamConfig, FamState, convert
from transformerfam.errors import StateMismatchError, TransformerFamError
from transformerfam.fam.convert import personal_memory
from transformerfam.fam.prompt import prefix_from_prompt, set_prompt
from transformerfam.rivals import RivalConfig, attach

IDS = random_ids(2, 19)


def make_converted() -> Any:
    return convert(make_tiny_llama(), FamConfig(fam_key_bias=0.0, block_size=8, fam_length=3, num_memory_segments=1))


MODELS = {
    "fam": make_converted(),
    "rival": attach(make_tiny_llama(), RivalConfig(system="rmt", block_size=8, num_memory_tokens=2)),
}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
PACKED = torch.tensor([[*range(10), *range(9)]])

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "packed by positions": ({"position_ids": PACKED}, "position_ids are .* packed into one row as rows of a batch"),
    "positions that jump": ({"position_ids": 2 * torch.arange(19)[None]}, "position_ids are"),
    "positions that stand still": ({"position_ids": torch.zeros(2, 19)}, "position_ids are"),
    "fewer positions": ({"position_ids": torch.arange(7)[None]}, "position_ids are"),
    "packed by lengths": ({"cu_seq_lens_q": torch.tensor([0, 9, 19])}, "cu_seq_lens_q is given"),
    "later tokens": ({"is_causal": False}, "is_causal is False"),
    "attention weights": ({"output_attentions": True}, "output_attentions is not available"),
    "narrow mask": ({"attention_mask": torch.ones(2, 18)}, r"attention_mask has shape \(2, 18\)"),
    "mask of pairs": ({"attention_mask": torch.ones(2, 1, 19, 19)}, "attention_mask has shape"),
    "mask that is added": ({"attention_mask": torch.zeros(2, 19) - 1e9}, "attention_mask has the entry -1000000000.0"),
    "mask without a number": ({"attention_mask": torch.full((2, 19), torch.nan)}, "attention_mask has the entry nan"),
    "soft cap of another": ({"softcap": 1.0}, "softcap is given"),
    "sinks of another": ({"s_aux": torch.zeros(4)}, "s_aux is given"),
    "window of another": ({"sliding_window": 2}, "sliding_window is given"),
    "one dimension": ({"input_ids": IDS[0]}, r"token ids have shape \(19,\), required is \(batch, tokens\)"),
    "embeddings, too": ({"inputs_embeds": torch.zeros(2, 19, 32)}, "exactly one of"),
}


@every_model
@pytest.mark.parametrize("name", REFUSED)
def test_argument_of_forward_is_refused_by_name(model: Any, name: str) -> None:
    """Catches an argument that is dropped, as positions by which transformers distinguishes packed texts."""
    arguments, match = REFUSED[name]
    state = model.init_state(2)
    with pytest.raises(TransformerFamError, match=match):
        model(**{"input_ids": IDS, "past_key_values": state} | arguments)
    assert state.num_tokens_read == 0


@every_model
@torch.no_grad()
def test_argument_of_forward_is_heard(model: Any) -> None:
    """Catches a positional argument that is lost, and outputs of another form than was wanted."""
    expected = model(input_ids=IDS).logits
    shifted = torch.arange(5, 24).expand(2, -1)
    assert torch.equal(model(IDS, torch.ones_like(IDS), shifted, is_causal=True).logits, expected)
    assert torch.equal(model(input_ids=IDS, return_dict=False)[0], expected)
    decoder = model.get_decoder()
    hidden, state = decoder(input_ids=IDS, return_dict=False)[:2]
    assert torch.equal(hidden, decoder(input_ids=IDS).last_hidden_state)
    assert state.num_tokens_read == 19
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(input_ids=IDS, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(padded, model(input_ids=IDS, attention_mask=mask).logits)


@every_model
@torch.no_grad()
def test_mask_is_cut_alike_by_read_and_forward(model: Any) -> None:
    """Catches `read` that takes the first columns of a longer mask, and `forward` that takes the last."""
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :3] = mask[1, 5:9] = 0
    states = [model.init_state(2) for _ in range(3)]
    model(input_ids=IDS, attention_mask=mask, past_key_values=states[0])
    model.read(IDS, states[1], attention_mask=mask)
    model.read(IDS.tolist(), states[2], attention_mask=mask[:, 5:].tolist())
    for state in states:
        assert state.row_lengths == (19, 15)
        torch.testing.assert_close(state.first_carried, states[0].first_carried, atol=1e-5, rtol=1e-5)
    with pytest.raises(TransformerFamError, match=r"attention_mask has shape \(2, 18\)"):
        model.read(IDS, states[0], attention_mask=mask[:, :18])
    assert states[0].row_lengths == (19, 15)


READS: dict[str, tuple[dict[str, Any], str]] = {
    "floats": ({"input_ids": IDS + 0.7}, "token ids are of type torch.float32, required are integers"),
    "a list of floats": ({"input_ids": [1.5, 2.0]}, "token ids are of type"),
    "flags": ({"input_ids": IDS > 3}, "token ids are of type torch.bool"),
    "three dimensions": ({"input_ids": IDS[None]}, "token ids have shape"),
    "mask that is added": (
        {"input_ids": IDS, "attention_mask": torch.zeros(2, 19) - 1e9},
        "attention_mask has the ent",
    ),
    "mask of counts": ({"input_ids": IDS, "attention_mask": [[2] * 19] * 2}, "attention_mask has the entry 2"),
    "nothing": ({"input_ids": []}, "input is empty"),
    "a bar by name": ({"input_ids": IDS, "progress": "bar"}, "progress is 'bar'"),
    "another thing for a state": ({"input_ids": IDS, "state": {}}, "state is a dict"),
}


@every_model
@pytest.mark.parametrize("name", READS)
def test_argument_of_read_is_refused_by_name(model: Any, name: str) -> None:
    """Catches ids that are truncated to integers, and what fails somewhere inside."""
    arguments, match = READS[name]
    with pytest.raises(TransformerFamError, match=match):
        model.read(**arguments)


def test_saved_flags_that_fit_no_fam_are_refused() -> None:
    for arguments in ({"is_saved": [True]}, {"batch_size": 2, "is_saved": [False]}):
        with pytest.raises(TransformerFamError, match="is_saved is"):
            MODELS["fam"].init_state(**arguments)


@every_model
def test_paged_generation_is_refused_by_name(model: Any) -> None:
    """Catches a way of generating that goes around the state."""
    with pytest.raises(TransformerFamError, match="continuous batching"):
        model.generate_batch([[1, 2, 3]])
    with pytest.raises(StateMismatchError, match="is a DynamicCache"):
        model(input_ids=IDS, past_key_values=make_tiny_llama()(IDS).past_key_values)


def test_options_of_the_harness_are_heard() -> None:
    """Catches options of a task that are dropped: a length by another name, beams, a temperature without sampling."""
    harness = pytest.importorskip("transformerfam.tools.lm_eval")
    model, tokenizer = make_passkey_model()
    lm = harness.FamLM(model, tokenizer=tokenizer)
    context = "There is an important info hidden. The grass is green."
    calls: list[dict[str, Any]] = []
    lm.model.generate = lambda *args, **kwargs: calls.append(kwargs) or torch.zeros(1, 2, dtype=torch.long)
    lm._continue(context, {"temperature": 0.7, "num_beams": 3, "until": "."})
    lm._continue(context, {"temperature": 0.0, "repetition_penalty": 1.5})
    chosen = [
        {k: call.get(k) for k in ("do_sample", "temperature", "num_beams", "repetition_penalty")} for call in calls
    ]
    assert chosen[0] == {"do_sample": True, "temperature": 0.7, "num_beams": 3, "repetition_penalty": None}
    assert chosen[1] == {"do_sample": False, "temperature": None, "num_beams": None, "repetition_penalty": 1.5}
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens"):
        lm._continue(context, {name: 3})
        assert calls[-1]["max_new_tokens"] == 3
    with pytest.raises(TransformerFamError, match="max_length is 20"):
        lm._continue(context, {"max_length": 20})
    with pytest.raises(TransformerFamError, match="dtype is 'auto'"):
        harness.FamLM(model, tokenizer=tokenizer, dtype="auto")


WRONG_CALLS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "ragged ids": (lambda m, s: m.read([[1, 2], [3]]), "input_ids is not a tensor"),
    "text as ids": (lambda m, s: m.read("abc"), "input_ids is not a tensor"),
    "no ids": (lambda m, s: m.read(None), "input_ids is not a tensor"),
    "text as mask": (lambda m, s: m.read([1, 2], attention_mask="x"), "attention_mask is not a tensor"),
    "plain values": (lambda m, s: convert(make_tiny_llama(), {"block_size": 8}), "config is a dict, required is a Fam"),
    "no configuration": (lambda m, s: convert(make_tiny_llama(), None), "config is a NoneType"),
    "rival's plain values": (lambda m, s: attach(make_tiny_llama(), {}), "config is a dict, required is a Rival"),
    "one flag": (lambda m, s: m.init_state(is_saved=3), "is_saved is 3, required are True or False"),
    "text as rows": (lambda m, s: s.select("a"), "rows is not a tensor"),
    "no rows": (lambda m, s: s.select(None), "rows is not a tensor"),
    "text as number": (lambda m, s: s.crop("a"), "tokens_to_remove is 'a', required is an integer"),
    "no path": (lambda m, s: s.save(None), "the path is None, required is the name of a file"),
    "no path to load": (lambda m, s: FamState.load(None, m), "the path is None, required is the name of a file"),
    "no memory": (lambda m, s: FamState.load("s", make_tiny_llama()), "the model has no memory yet"),
    "prompt out of range": (lambda m, s: set_prompt(m, [1, 2, 99]), "token id 99 is out of range"),
    "prompt of fractions": (lambda m, s: set_prompt(m, [1.5, 2.5, 3.5]), "required are integers"),
    "no prompt": (lambda m, s: prefix_from_prompt(convert(make_tiny_llama(), FamConfig(fam_length=0))), "of at least"),
    "preset's name": (lambda m, s: FamConfig.preset(["paper"]), "there is no preset"),
    "no fields": (lambda m, s: FamConfig.from_dict(None), "FamConfig is None, required are its fields by name"),
    "saved FAM": (lambda m, s: m.init_state(fam=s.fams * float("nan")), "fam has numbers that are not finite"),
    "personal memory": (lambda m, s: personal_memory(m, s.fams[:, 0] / 0), "has numbers that are not finite"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_value_of_another_kind_is_refused_by_name(name: str) -> None:
    """Catches errors of Python's and torch's own, which name neither the argument nor the remedy."""
    call, match = WRONG_CALLS[name]
    model: Any = convert(make_tiny_llama(), FamConfig(fam_key_bias=0.0, block_size=8, fam_length=3))
    with pytest.raises(TransformerFamError, match=match):
        call(model, model.read([1, 2, 3]))
