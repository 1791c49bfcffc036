"""Converted models in EleutherAI's lm-evaluation-harness: model `fam`, with prompts of any length in constant memory.

`python -m transformerfam.tools.lm_eval run --model fam --model_args pretrained=FOLDER --tasks hellaswag` is the
harness's own command line with this model registered; a script registers it by `import transformerfam.tools.lm_eval`.
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from transformerfam.config import FAM_DTYPES, FamConfig
from transformerfam.decoder.memory import hold_weights_in
from transformerfam.errors import TransformerFamError
from transformerfam.fam.state import FamState
from transformerfam.tasks.text import end_ids
from transformerfam.tasks.unknown_words import SOME_UNKNOWN, unknown_share
from transformerfam.weights.models import find_device, load_model
from transformerfam.weights.peft_adapters import base_of, load_peft_folder
from transformerfam.weights.pretrained import load_pretrained

logger = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 256
LOGITS_AT_ONCE = 512


@register_model("fam")
class FamLM(TemplateLM):
    """Score and continue prompts of any length with a converted model.

    A context is read once for all of its continuations, in constant memory, and nothing is cut off.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | PreTrainedModel,
        system: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
        peft: str | None = None,
        **fields: Any,
    ) -> None:
        """Load a model.

        Args:
            pretrained: "tiny", "smollm2" or a folder, as for `transformerfam.weights.models.load_model`; or a converted
                model.
            system: "fam", "bswa" or "fam_untrained"; "fam" if none is given. A model that is given is its own.
            device: where to; if none is given, and for "cuda:0", the harness's own default, where there is no CUDA: the
                CPU, or where a model that is given is.
            dtype: "float32", "bfloat16" or "float16"; if none is given, float32, or what a model that is given has.
            batch_size: continuations of one context that are scored together.
            max_batch_size: ignored; the harness hands it over.
            tokenizer: of a converted model, or the folder of one. With a folder of a model, whose tokenizer is taken, a
                name here is read by tasks alone that generate text by length.
            peft: folder of an adapter that PEFT wrote, which is added to the weights.
            **fields: of `FamConfig`, in place of the trained ones, as in `fam_key_bias=-8`; not for a model that is
                given.

        Raises:
            TransformerFamError: no such model, system, device or field, a batch size that is no number, or an argument
                that a model that is given leaves no room for.
        """
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise TransformerFamError(
                f"batch_size is {batch_size!r}, required is a number of at least 1; give --batch_size 8"
            )
        if dtype not in (None, *FAM_DTYPES):
            raise TransformerFamError(f"dtype is {dtype!r}, required is one of {', '.join(FAM_DTYPES)}")
        self.batch_size = int(batch_size)
        if device == "cuda:0" and not torch.cuda.is_available():
            logger.warning("there is no CUDA here, so the model stays on the CPU")
            device = None
        self._device = find_device(device or "cpu")
        self._is_unknown_said = False
        self.model: Any = pretrained
        self.tokenizer: Any = tokenizer
        if isinstance(pretrained, str | os.PathLike):
            self.model, own = load_model(pretrained, "fam" if system is None else system, fields)
            self.tokenizer = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else own
            self.name, dtype = str(pretrained), dtype or "float32"
        else:
            _require_as_given(pretrained, fields if system is None else {"system": system} | fields)
            if isinstance(tokenizer, str | os.PathLike):
                self.tokenizer = load_pretrained(AutoTokenizer, tokenizer)
            self.name = type(pretrained).__name__
            self._device = self._device if device else base_of(pretrained).device
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            raise TransformerFamError(
                f"tokenizer is {self.tokenizer!r}, required is the tokenizer of the model that is given, or its folder"
            )
        if peft is not None:
            load_peft_folder(self.model, peft, merge=True)
        if dtype is not None:
            hold_weights_in(dtype, self.model)
        self.model.to(self._device)

    @property
    def fam_config(self) -> FamConfig:
        """The configuration that the model reads with."""
        return self.model.fam_config

    # Text and tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            TransformerFamError: the tokenizer has none.
        """
        if self.tokenizer.eos_token_id is None:
            raise TransformerFamError(
                "the tokenizer has no end-of-text token, which the harness puts in front of a text without context; "
                "set tokenizer.eos_token"
            )
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """The name under which requests are cached."""
        return self.name.replace("/", "__")

    @property
    def max_length(self) -> int:
        """No limit: the largest number that tasks compare lengths with."""
        return 1 << 30

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the token ids of a text, of which the last `left_truncate_len` where so many are wanted.

        None begins it as the tokenizer begins texts, unless it has that token in front, False as what follows a text.
        """
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        ids = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        share = unknown_share(self.tokenizer, ids[1:])
        if share >= SOME_UNKNOWN and not self._is_unknown_said:
            self._is_unknown_said = True
            logger.warning(f"{share:.1%} of a text's tokens are words that the tokenizer does not know; others may too")
        return list(ids)[-(left_truncate_len or 0) :]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the model's own template writes it."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template, or none where none was chosen."""
        return self.tokenizer.chat_template if chat_template else None

    # Scores

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Score continuations; those of one context, which are adjacent, share its reading."""
        results: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm) as bar:
            while len(results) < len(requests):
                first = requests[len(results)][1]
                alike = 1
                while len(results) + alike < len(requests) and requests[len(results) + alike][1] == first:
                    alike += 1
                context = first or [self.prefix_token_id]
                state = self.model.init_state()
                if len(context) > 1:
                    self.model.read(context[:-1], state)
                targets = [targets for _, _, targets in requests[len(results) : len(results) + alike]]
                for start in range(0, alike, self.batch_size):
                    part = targets[start : start + self.batch_size]
                    scored = self._score(state.select([0] * len(part)), context[-1], part)
                    for result in scored:
                        request, _, _ = requests[len(results)]
                        if request is not None:
                            self.cache_hook.add_partial("loglikelihood", request, result)
                        results.append(result)
                bar.update(alike)
        return results

    def _score(self, state: FamState, last: int, targets: Sequence[list[int]]) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation after `last`, and whether it is the likeliest.

        Raises:
            TransformerFamError: a continuation has no tokens.
        """
        if not all(targets):
            raise TransformerFamError("a continuation has no tokens, at least one is required; give it a text")
        inputs = pad_sequence([torch.tensor([last, *row[:-1]]) for row in targets], batch_first=True)
        wanted = pad_sequence([torch.tensor(row) for row in targets], batch_first=True)
        mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in targets], batch_first=True)
        totals, are_likeliest = (
            torch.zeros(len(targets), dtype=torch.float64),
            torch.ones(len(targets), dtype=torch.bool),
        )
        for start in range(0, inputs.shape[1], LOGITS_AT_ONCE):
            columns = slice(start, start + LOGITS_AT_ONCE)
            is_real = mask[:, columns].bool()
            logits = self.model(
                input_ids=inputs[:, columns].to(self._device),
                attention_mask=mask[:, columns].to(self._device),
                past_key_values=state,
            ).logits.float()
            log_probs = logits.log_softmax(-1).cpu()
            own = log_probs.gather(-1, wanted[:, columns, None])[..., 0]
            totals += own.masked_fill(~is_real, 0).sum(-1, dtype=torch.float64)
            are_likeliest &= ((log_probs.argmax(-1) == wanted[:, columns]) | ~is_real).all(-1)
        return list(zip(totals.tolist(), are_likeliest.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, each read once from its beginning to its end: no window, nothing cut off."""
        results = []
        for request in tqdm(requests, desc="rolling log-likelihoods", disable=disable_tqdm):
            (text,) = request.args
            ids = self.tok_encode(text)
            total = self._score(self.model.init_state(), self.prefix_token_id, [ids])[0][0] if ids else 0.0
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            results.append(total)
        return results

    # Generation

    @torch.no_grad()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until one of its stop texts."""
        results = []
        for request in tqdm(requests, desc="generating", disable=disable_tqdm):
            context, options = request.args
            text = self._continue(context, dict(options))
            self.cache_hook.add_partial("generate_until", request.args, text)
            results.append(text)
        return results

    def _continue(self, context: str, options: dict[str, Any]) -> str:
        options = dict(normalize_gen_kwargs(options, DEFAULT_NEW_TOKENS))
        if "max_length" in options:
            raise TransformerFamError(
                f"max_length is {options['max_length']!r}, which counts the context, too; give max_gen_toks instead"
            )
        until, num_new = [stop for stop in options.pop("until", []) if stop], options.pop("max_gen_toks")
        if not options["do_sample"]:
            options.pop("temperature", None)  # 0 is greedy, and warns
        ids = self.tok_encode(context) or [self.prefix_token_id]
        state = self.model.init_state()
        if len(ids) > 1:
            self.model.read(ids[:-1], state)
        ids_1T = torch.tensor([ids], device=self._device)  # of which the state has read all but the last
        pad = self.tokenizer.pad_token_id
        ends = end_ids(self.tokenizer, options.pop("eos_token_id", self.model.generation_config.eos_token_id))
        output = self.model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            past_key_values=state,
            max_new_tokens=num_new,
            pad_token_id=self.eot_token_id if pad is None else pad,
            eos_token_id=sorted(ends),
            stopping_criteria=[_StopTexts(self.tokenizer, until, len(ids))],
            **options,
        )
        return _cut(self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True), until)


def _require_as_given(model: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse what is no converted model, and arguments that would have to convert it again.

    Raises:
        TransformerFamError: the message names the argument.
    """
    if not hasattr(model, "init_state"):
        raise TransformerFamError(
            f"pretrained is a {type(model).__name__}, required is a folder, tiny, smollm2 or a converted model; call "
            "convert(model, FamConfig(...)) first"
        )
    for name, value in arguments.items():
        raise TransformerFamError(
            f"{name} is {value!r}, and pretrained is a model that is converted already; leave {name} out, and convert "
            "or load the model with it"
        )


class _StopTexts(StoppingCriteria):
    """Stop when the text after the context holds one of some texts.

    transformers' own criterion also looks at the context, and stops where a text begins there.
    """

    def __init__(self, tokenizer: Any, until: Sequence[str], num_context: int) -> None:
        self.tokenizer = tokenizer
        self.until = until
        self.num_context = num_context

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.num_context :]) if self.until else [""] * len(input_ids)
        return torch.tensor([any(stop in text for stop in self.until) for text in texts], device=input_ids.device)


def _cut(text: str, until: Iterable[str]) -> str:
    """Return a text as far as the first stop text."""
    for stop in until:
        text = text.split(stop)[0]
    return text


def main() -> None:
    """Run the harness's own command line with model `fam` registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
