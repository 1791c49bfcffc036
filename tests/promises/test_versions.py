"""The range of versions: both names of the cache, state files across versions, and the messages outside the range."""

import logging
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from state_file import FOLDER, make_same_model, text
from tiny_llama import make_tiny_llama, random_ids
from transformers import pipeline

from transformerfam import FamConfig, FamState, convert, versions
from transformerfam.decoder.cache_argument import CACHE_NAME, NEW_NAME, OLD_NAME, as_cache
from transformerfam.decoder.positions import Turner
from transformerfam.errors import (
    MissingPackageError,
    TransformerFamError,
    UnsupportedModelError,
    UnsupportedVersionError,
)
from transformerfam.fam.compiled import compile_decoding
from transformerfam.rivals.attach import attach
from transformerfam.rivals.config import RivalConfig

ROOT = Path(__file__).parents[2]
CONFIG = FamConfig(fam_key_bias=0.0, block_size=8, fam_length=3, num_memory_segments=1)
NAMES = (NEW_NAME, OLD_NAME)
STATE_FILES = sorted(FOLDER.glob("state_of_transformers_*.safetensors"))
TOLERANCE = 1e-4  # another processor and torch round otherwise; logits are about 10


def converted() -> Any:
    return convert(make_tiny_llama(), CONFIG)


def in_peft() -> Any:
    return peft.get_peft_model(converted(), peft.LoraConfig(r=2, target_modules=["q_proj"]))


def compiled() -> Any:
    model = converted()
    compile_decoding(model, backend="eager")
    return model


def with_rival() -> Any:
    return attach(make_tiny_llama(), RivalConfig(system="rmt", block_size=8, num_memory_tokens=3))


def call(model: Any, ids: torch.Tensor, cache: dict[str, Any]) -> Any:
    return model(input_ids=ids, **cache).logits


def call_decoder(model: Any, ids: torch.Tensor, cache: dict[str, Any]) -> Any:
    return model.get_decoder()(input_ids=ids, **cache).last_hidden_state


def generate(model: Any, ids: torch.Tensor, cache: dict[str, Any]) -> Any:
    return model.generate(input_ids=ids, **cache, max_new_tokens=5, do_sample=False)


def generate_assisted(model: Any, ids: torch.Tensor, cache: dict[str, Any]) -> Any:
    assistant = make_tiny_llama(1, seed=1)
    return model.generate(input_ids=ids, **cache, max_new_tokens=5, do_sample=False, assistant_model=assistant)


class Digits:
    """The least that a text-generation pipeline wants of a tokenizer: ids in, ids out."""

    pad_token_id, eos_token_id, padding_side, chat_template = 0, None, "left", None

    def __call__(self, text: str, **kwargs: Any) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[int(word) for word in text.split()]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, ids: Any, **kwargs: Any) -> str:
        return "".join(f"{int(i)} " for i in ids)


WAYS: dict[str, tuple[Callable[[], Any], Callable[..., Any]]] = {
    "model": (converted, call),
    "decoder": (converted, call_decoder),
    "generate": (converted, generate),
    "assisted generation": (converted, generate_assisted),
    "PEFT": (in_peft, call),
    "PEFT's generate": (in_peft, generate),
    "compiled": (compiled, generate),
    "rival": (with_rival, call),
    "rival's decoder": (with_rival, call_decoder),
    "rival's generate": (with_rival, generate),
    "rival's assisted generation": (with_rival, generate_assisted),
}


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What transformers warns of once a process, however often it did before."""
    messages: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, message, *args: messages.append(message))
    return messages


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_both_names_of_the_cache_go_on_with_the_reading(way: str, logged: list[str]) -> None:
    """Catches a name that is refused, ignored or warned of (warnings are errors) where a state can be handed over."""
    make, use = WAYS[way]
    torch.manual_seed(0)
    model = make()
    ids, state = random_ids(1, 6, seed=2), model.read(random_ids(1, 21))
    given = [use(model, ids, {name: state.fork()}) for name in NAMES]
    assert torch.equal(given[0], given[1])
    if use is not generate_assisted:  # which may say the same without a state
        assert not torch.equal(given[0], use(model, ids, {}))
    assert not [message for message in logged if OLD_NAME in message]


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_both_names_at_once_are_refused(way: str) -> None:
    """Catches a state that is silently dropped for another one."""
    make, use = WAYS[way]
    model = make()
    with pytest.raises(TransformerFamError, match=r"two caches are given: cache and past_key_values are two names"):
        use(model, random_ids(1, 6), {name: model.init_state() for name in NAMES})


@torch.no_grad()
def test_state_by_position_goes_on_and_is_refused_beside_another() -> None:
    """Catches a positional state that one given by name replaces; the decoder's own signature refuses one name."""
    model, ids = converted(), random_ids(1, 6, seed=2)
    for reader in (model, model.get_decoder()):
        state, expected = (model.read(random_ids(1, 21)) for _ in range(2))
        found = reader(ids, None, None, state)[0]
        assert torch.equal(found, reader(ids, **as_cache(expected))[0])
        for name in NAMES:
            with pytest.raises((TransformerFamError, TypeError), match=r"two caches|multiple values for .* 'cache'"):
                reader(ids, None, None, state, **{name: state.fork()})


@torch.no_grad()
def test_pipeline_takes_a_state_under_both_names(logged: list[str]) -> None:
    """Catches a pipeline that drops the state."""
    model = converted()
    tokenizer: Any = Digits()
    model.generation_config.pad_token_id = 0
    say = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    state, question = model.read(random_ids(1, 21)), "3 1 4"
    answers = [say(question, **{name: state.fork()}, max_new_tokens=5, do_sample=False) for name in NAMES]
    assert answers[0] == answers[1]
    ids = model.generate(torch.tensor([[3, 1, 4]]), **{CACHE_NAME: state.fork()}, max_new_tokens=5, do_sample=False)[0]
    assert answers[0][0]["generated_text"] == question + tokenizer.decode(ids[3:])
    assert not [message for message in logged if OLD_NAME in message]


@torch.no_grad()
@pytest.mark.parametrize("make", [converted, with_rival])
def test_outputs_carry_the_versions_own_name(make: Callable[[], Any], logged: list[str]) -> None:
    """Catches an output in which what transformers looks for is missing."""
    model = make()
    plain = make_tiny_llama()(random_ids(1, 9))
    output = model(random_ids(1, 9))
    assert list(output.keys()) == list(plain.keys())
    assert output[CACHE_NAME].num_tokens_read == 9
    said = model.generate(random_ids(1, 9), max_new_tokens=2, return_dict_in_generate=True)
    assert said[CACHE_NAME].num_tokens_read == 10
    assert not [message for message in logged if OLD_NAME in message]


@torch.no_grad()
def test_none_under_the_other_name_is_not_a_second_cache() -> None:
    """Catches a caller's default that is taken for a state."""
    model, ids = converted(), random_ids(1, 6)
    state = model.read(random_ids(1, 21))
    expected = call(model, ids, {CACHE_NAME: state.fork()})
    for name, other in (NAMES, NAMES[::-1]):
        assert torch.equal(call(model, ids, {name: state.fork(), other: None}), expected)


def test_signatures_are_those_of_the_class() -> None:
    """Catches a Trainer that drops columns, or an accelerate that unwraps what the conversion had put there."""
    import inspect

    model = converted()
    for name in ("forward", "generate"):
        assert inspect.signature(getattr(model, name)) == inspect.signature(getattr(make_tiny_llama(), name))
        assert not hasattr(getattr(model, name), "__wrapped__")


# State files


@torch.no_grad()
@pytest.mark.parametrize("path", STATE_FILES, ids=lambda path: path.stem)
def test_state_file_of_another_version_loads_and_says_nothing(path: Path) -> None:
    """Catches a state file that depends on the version it was written under (a warning is an error here)."""
    model, ids = make_same_model(), random_ids(1, 13, seed=2)
    loaded, read = FamState.load(path, model), model.read(text())
    assert loaded.row_lengths == read.row_lengths
    given, expected = (call(model, ids, {CACHE_NAME: state}) for state in (loaded, read))
    torch.testing.assert_close(given, expected, atol=TOLERANCE, rtol=0)


def test_state_files_are_of_both_edges() -> None:
    """Catches an edge that moved without its state file."""
    written = {path.stem.removeprefix("state_of_transformers_") for path in STATE_FILES}
    assert written == set(versions.TESTED["transformers"])


# Messages outside of the range


def test_edges_are_pinned_as_they_are_documented() -> None:
    """Catches a floor, a lock, the metadata and the docs that name different versions."""
    oldest, newest = versions.TESTED["transformers"]
    assert f"transformers=={oldest}\n" in (ROOT / "requirements-oldest.lock").read_text()
    assert f"transformers=={newest}\n" in (ROOT / "requirements-newest.lock").read_text()
    assert f"transformers=={newest}\n" in (ROOT / "requirements.lock").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = {f"{package}>={floor}" for package, (floor, _) in versions.TESTED.items()}
    assert floors <= set(project["dependencies"])
    assert f"peft>={versions.OLDEST_PEFT}" in project["optional-dependencies"]["train"]
    documented = (ROOT / "docs" / "reference" / "versions.md").read_text()
    for edges in versions.TESTED.values():
        assert all(edge in documented for edge in edges)


@pytest.mark.parametrize(("package", "version"), [("transformers", "4.57.6"), ("torch", "2.3.1")])
def test_version_below_the_floor_is_refused_at_import(package: str, version: str) -> None:
    """Catches an old version that fails with an import of a name which it lacks."""
    floor = versions.TESTED[package][0]
    code = f"import {package}; {package}.__version__ = '{version}'; import transformerfam"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    expected = (
        f"{package} is {version}, required is at least {floor}; install it with: pip install '{package}>={floor}'"
    )
    assert expected in run.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({}, r"are tested versions, so it is this model that differs"),
        (
            {"transformers": "5.99.0"},
            r"; transformers 5\.99\.0 is newer than any we tested \(5\.[\d.]+\), and may have changed this family; "
            r"try: pip install 'torch<=[\d.]+' 'transformers<=[\d.]+'$",
        ),
        ({"torch": "2.99.1+cu140"}, r"; torch 2\.99\.1\+cu140 is newer than any we tested"),
    ],
)
def test_refused_conversion_says_whether_the_version_may_be_the_cause(
    installed: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a family that is blamed for what a new version changed, and the other way round."""
    here = versions.installed_versions() | {"torch": versions.TESTED["torch"][0]} | installed
    monkeypatch.setattr(versions, "installed_versions", lambda: here)
    turn = Turner.turn
    monkeypatch.setattr(Turner, "turn", lambda self, key, value, distance: turn(self, key, value, 2 * distance))
    with pytest.raises(UnsupportedModelError, match=f"the position seam does not fit this model.*{message}"):
        converted()


def test_argument_that_a_new_version_renames_is_refused_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bare TypeError, and a model that is left half converted."""
    here = versions.installed_versions() | {"transformers": "5.99.0"}
    monkeypatch.setattr(versions, "installed_versions", lambda: here)
    model = make_tiny_llama()
    ids = random_ids(1, 9)
    before = model(ids).logits
    forward = type(model.model).forward

    def renamed(self: Any, *args: Any, position_ids: None = None, **kwargs: Any) -> Any:
        raise TypeError("forward() got an unexpected keyword argument 'position_ids'")

    monkeypatch.setattr(type(model.model), "forward", renamed)
    with pytest.raises(UnsupportedModelError, match=r"does not run as conversion runs it .*position_ids.*5\.99\.0 is"):
        convert(model, CONFIG)
    monkeypatch.setattr(type(model.model), "forward", forward)
    assert torch.equal(model(ids).logits, before)


def test_missing_peft_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(package: str) -> str:
        raise versions.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(versions.importlib.metadata, "version", not_found)
    with pytest.raises(MissingPackageError, match=r"pip install 'transformerfam\[train\]'"):
        versions.require_peft()


def test_peft_below_the_floor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions.importlib.metadata, "version", lambda package: "0.17.1")
    with pytest.raises(
        UnsupportedVersionError, match=r"peft is 0\.17\.1, required is at least .*pip install -U 'peft>="
    ):
        versions.require_peft()


def test_peft_that_does_not_know_transformers_is_refused_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an import error that is taken for a package which is not installed."""
    monkeypatch.setitem(sys.modules, "peft", None)
    here = transformers.__version__.replace(".", r"\.")
    with pytest.raises(
        UnsupportedVersionError, match=rf"peft [\d.]+ does not know transformers {here} .*pip install -U"
    ):
        versions.require_peft()
