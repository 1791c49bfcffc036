"""The sections of a recipe that say what is read, and what is predicted."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, SerializeAsAny, ValidationError, model_validator

from transformerfam.errors import RecipeError
from transformerfam.tasks.ranges import Count, Integer, Limits, Natural, NotNegative, Share, Texts
from transformerfam.tasks.registry import TASKS, task_of_keys
from transformerfam.tasks.section import Section, require
from transformerfam.tasks.writing import TaskSection
from transformerfam.training.recipe.messages import recipe_error, unknown_key


def build_data(values: Any) -> TaskSection:
    """Return the section `data` of a recipe, of the class that its key `task` says.

    Without that key it is `task_of_keys`.

    Raises:
        RecipeError: there is no such task, or a key is unknown, missing or wrong.
    """
    if isinstance(values, TaskSection):
        return values
    if not isinstance(values, dict):
        raise RecipeError(f"data is {values!r}, required is a section with keys; change it")
    keys = {name: task.section.model_fields for name, task in TASKS.items()}
    name = values.get("task", task_of_keys(values))
    if not isinstance(name, str) or name not in TASKS:
        raise RecipeError(f"data.task is {name!r}, required is one of {', '.join(TASKS)}; change it")
    for key in (key for key in values if key not in keys[name]):
        others = [other for other in TASKS if key in keys[other]]
        if not others:
            known = keys[name] if "task" in values else {key: None for fields in keys.values() for key in fields}
            raise unknown_key("data", key, known)
        raise RecipeError(
            f"data.{key} is a key of task {' and '.join(map(repr, others))}, and the task is {name!r}; leave it out, "
            "or set data.task"
        )
    kind = TASKS[name].section
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise recipe_error(kind, values, error, "data") from error


DataSection = Annotated[SerializeAsAny[TaskSection], BeforeValidator(build_data)]


class InstructionSection(Section):
    """Instructions and texts, packed to sequences of one length (3.1.1), in place of passkeys."""

    files: Texts
    """JSON lines, each with `messages` (the tokenizer's chat template), with `prompt` and `answer`, or with `text`;
    UTF-8 `.txt` files, each one text; and folders, for all `.txt` files in them and their folders."""
    length: Integer = 8500
    """Tokens of a packed sequence, the repeated segment included."""
    repeat_tokens: Natural = 256
    """Consecutive tokens, drawn from the sequence, that it ends with once more; 0 repeats nothing."""
    repeat_weight: NotNegative = 0.1
    """Weight of the repeated tokens; answers and plain texts weigh 1, prompts, examples and other roles 0."""
    sampled_tokens: Count | None = None
    """Random tokens of every `fam.block_size` that are predicted; None is all. With fewer a step is faster, above all
    where the vocabulary is large."""
    early_share: Share = 0.0
    """Share of the sampled tokens that is drawn from the first quarter of each block, where the memory is all that
    there is of the text before; the rest is drawn from the whole block."""
    mix_sequences: bool = False
    """Draw the sequences of a batch from all over the texts, as plain training does. False reads each text from its
    beginning to its end, one sequence after the other, so that a passed state continues its text."""

    @model_validator(mode="after")
    def _require_lengths(self) -> Self:
        require(len(self.files) > 0, "instructions.files is empty, required is at least one file")
        require(
            self.length > 2 * self.repeat_tokens + 1,
            f"instructions.length is {self.length}, required is more than twice instructions.repeat_tokens "
            f"({self.repeat_tokens})",
        )
        require(
            self.early_share == 0 or self.sampled_tokens is not None,
            f"instructions.early_share is {self.early_share} without instructions.sampled_tokens, of which it is a "
            "share; add that, or leave it out",
        )
        return self


class EvaluationSection(Section):
    """Evaluation while training, on texts and questions that are held out; the best weights become the memory."""

    every: Count
    """Steps between two evaluations; one more follows the last step."""
    files: Texts = ()
    """Held-out texts, in the form of `instructions.files`: their loss, in nats per token, is `validation_loss` in the
    log."""
    num_sequences: Count = 16
    """Sequences of `instructions.length` tokens that are drawn once from all over the texts."""
    questions: str | None = None
    """Held-out questions, in the form of `fam evaluate answers`: the mean of their F1, or of right choices, is
    `validation_score` in the log. Each text is read whole, so let them be few."""
    keep: Literal["loss", "score", "last"] | None = None
    """What the kept weights are best by, or the last step's; by default the score if there are questions, else the
    loss."""

    @model_validator(mode="after")
    def _require_something(self) -> Self:
        require(
            len(self.files) > 0 or self.questions is not None,
            "evaluation has neither files nor questions, required is one of them; name held-out texts",
        )
        for name, is_there in (("loss", len(self.files) > 0), ("score", self.questions is not None)):
            require(
                self.keep != name or is_there,
                f"evaluation.keep is {name!r}, and evaluation has no {'files' if name == 'loss' else 'questions'}, "
                "which it is measured on; name some, or keep another",
            )
        return self

    def require_held_out(self, instructions: InstructionSection | None) -> None:
        """Refuse texts whose sequences have no length.

        Raises:
            RecipeError: with the key.
        """
        require(
            instructions is not None or not self.files,
            "evaluation.files is given without a section instructions, whose length their sequences have; add it, or "
            "give evaluation.questions alone",
        )

    @property
    def kept_by(self) -> str:
        """What the kept weights are best by."""
        return self.keep or ("loss" if self.questions is None else "score")


class LossSection(Section):
    """Weights of the tokens that are predicted; each kind is averaged by itself."""

    key: NotNegative = 1.0
    """Weight of the key's tokens, or of an answer's."""
    other_tokens: NotNegative = 0.1
    """Weight of the other tokens."""
    num_other_tokens: Natural = 32
    """Random other tokens of each sequence that are predicted too; on stored filler those in front of the question."""
    teacher: NotNegative = 0.0
    """Weight of the distance to a teacher, the base model with full attention: it reads the sentences that give the key
    and the question in one piece, and over question and answer every layer's hidden states are to point where its own
    do. It says at every layer what is to be read from the FAM, where the key alone says it at the last."""
    teacher_filler_tokens: Limits = (0, 64)
    """Least and most tokens of filler between the sentences and the question that the teacher reads."""
    full_attention: bool = False
    """Let the other tokens be predicted as the base model with full attention predicts them, which reads the same
    sequence: their loss is the divergence KL(base, own), in place of that of the next token. It says more per token,
    and leaves the model what it is."""
    attention_outputs: NotNegative = 0.0
    """Weight of the distance of every layer's attention from that of the base model with full attention, at the tokens
    that are predicted: the squared length of the difference, relative to the mean squared length of the base's. It
    says at every layer what should have been read from the FAM. Needs `full_attention` and LoRA."""
    far_context: NotNegative = 0.0
    """With `full_attention`: by how much the weight of a token grows for each nat that the text before its stretch of
    (m + 1) blocks saves the base model. It trains most where a memory can help; 0 weighs all alike."""
    lessons: str | None = None
    """With `full_attention`: folder in which the base model's hidden states are kept, in bfloat16 (SmolLM2: 1.2 kB a
    token, twice with `far_context`), so that every run on the same sequences reads them in place of the base model.
    None reads with it in every step."""
    diversity: NotNegative = 0.0
    """Weight of the paper's diversity loss (C.4): the negative entropy of the tokens' attention over the FAM's rows."""
    reconstruction: NotNegative = 0.0
    """Weight of the paper's reconstruction loss (C.5): a block's attention from its queries and the updated FAM."""
    fam_change: NotNegative = 0.0
    """Weight of the change of the FAM, relative to its length and before `fam.fam_norm_bound`, in the updates by blocks
    that give no key: changes in one constant direction drown what was written, bound or not."""

    def require_teacher(self, has_own_base: bool) -> None:
        """Refuse what is about full attention without it, and comparisons for which the base model is not there.

        Args:
            has_own_base: whether the trained model has its base's weights, frozen and whole.

        Raises:
            RecipeError: with the key.
        """
        require(
            self.full_attention or (self.attention_outputs == self.far_context == 0 and self.lessons is None),
            "loss.attention_outputs, loss.far_context or loss.lessons is given without loss.full_attention, which "
            "they are about; set loss.full_attention = true, or leave them out",
        )
        require(
            self.attention_outputs == 0 or has_own_base,
            "loss.attention_outputs is above 0 and there is no section lora, or schedule.shard is true, required is "
            "a base model whose weights stay as they are and whole; add a lora section, or set it to 0",
        )
        require(
            self.attention_outputs == 0 or self.lessons is None,
            "loss.lessons is given with loss.attention_outputs, for which the base model reads every step anyway; "
            "leave one of them out",
        )
