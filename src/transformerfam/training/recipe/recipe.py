"""Recipes: all of a training run, and what contradicts itself in one."""

import json
from typing import Any, Self

from pydantic import model_validator

from transformerfam.config import FamConfig
from transformerfam.errors import RecipeError, TransformerFamError
from transformerfam.rivals import RivalConfig, rival_class
from transformerfam.tasks.passkey_training import PasskeySection
from transformerfam.tasks.section import Section, require
from transformerfam.tasks.writing import TaskSection
from transformerfam.training.recipe.configurations import OPEN_MEMORY, FamSection, RivalSection
from transformerfam.training.recipe.data_sections import (
    DataSection,
    EvaluationSection,
    InstructionSection,
    LossSection,
    build_data,
)
from transformerfam.training.recipe.sections import (
    KeyBiasSection,
    LoraSection,
    ModelSection,
    OptimizerSection,
    ReadingSection,
    ScheduleSection,
    Stage,
    StatePassingSection,
)


class Recipe(Section):
    """All of a training run."""

    model: ModelSection
    schedule: ScheduleSection
    fam: FamSection = FamConfig.from_dict(OPEN_MEMORY)
    """The memory: block sliding window attention (BSWA) and, with `fam_length` above 0, feedback attention memory
    (FAM). All lengths are in tokens."""
    rival: RivalSection | None = None
    """A system that FAM is compared with, in its place; segments are blocks of `fam.block_size`."""
    lora: LoraSection | None = None
    optimizer: OptimizerSection = OptimizerSection()
    state_passing: StatePassingSection = StatePassingSection()
    key_bias: KeyBiasSection | None = None
    data: DataSection = PasskeySection()
    instructions: InstructionSection | None = None
    evaluation: EvaluationSection | None = None
    loss: LossSection = LossSection()
    reading: ReadingSection = ReadingSection()

    @model_validator(mode="after")
    def _require_no_contradiction(self) -> Self:
        for check in (
            self._require_something_to_train_on,
            self._require_instructions,
            self._require_start,
            self._require_curriculum,
            self._require_teacher,
            self._require_parts,
            self._require_task,
            self._require_rival,
            self._require_updates,
            self._require_auxiliary,
            self._require_passable,
            self._require_key_bias,
        ):
            check()
        try:
            _ = self.reading_config
        except TransformerFamError as error:
            raise RecipeError(f"reading: {error}") from error
        return self

    def _require_something_to_train_on(self) -> None:
        """Refuse weights and shares that leave nothing to predict."""
        if self.instructions is not None:
            return
        loss = self.loss
        weights = (loss.key, loss.other_tokens, loss.teacher, loss.diversity, loss.reconstruction, loss.fam_change)
        require(any(weights), "every weight of loss is 0, required is one above 0")
        require(len(self.schedule.curriculum) > 0, "schedule.curriculum is empty, required is at least one stage")

    def _require_start(self) -> None:
        """Refuse blocks, a prompt and a bias that the memory cannot begin with."""
        smallest = min(self.schedule.block_sizes, default=self.fam.block_size)
        require(
            smallest >= self.fam.block_size,
            f"schedule.block_sizes has {smallest}, required is at least fam.block_size ({self.fam.block_size})",
        )
        require(
            self.model.prompt_text is None or (self.model.memory is None and self.fam.fam_init == "prompt"),
            "model.prompt_text is given with model.memory, which has its own prompt, or fam.fam_init is 'prefix'; "
            "leave one of them out",
        )

    def _require_curriculum(self) -> None:
        """Refuse stages that stored filler and the teacher cannot read."""
        for stage in self.schedule.curriculum:
            require(
                stage.repeated_tokens is None or self.schedule.stored_blocks == self.loss.teacher == 0,
                "a stage of the curriculum has repeated_tokens with schedule.stored_blocks or loss.teacher, which "
                "know one key; leave it out",
            )

    def _require_teacher(self) -> None:
        """Refuse a teacher that was never trained, or that has nothing to read."""
        require(
            (self.loss.teacher == 0 and not self.loss.full_attention) or self.model.base != "tiny-random",
            f"loss.teacher is {self.loss.teacher} or loss.full_attention is set, and model.base is 'tiny-random', "
            "required is a base model that was trained before, since it is the teacher; set loss.teacher = 0",
        )
        require(
            not self.loss.full_attention or self.schedule.stored_blocks == 0,
            "loss.full_attention is set and schedule.stored_blocks is above 0, where the text is not read; leave one "
            "of them out",
        )

        self.loss.require_teacher(has_own_base=self.lora is not None and not self.schedule.shard)

    def _require_key_bias(self) -> None:
        """Refuse a bias that does not end at 0 within the run."""
        if self.key_bias is not None:
            require(
                self.key_bias.start_step < self.key_bias.end_step <= self.schedule.steps,
                f"key_bias goes from step {self.key_bias.start_step} to {self.key_bias.end_step}, required is an end "
                f"after the start and within the {self.schedule.steps} steps",
            )
        require(
            self.fam.fam_key_bias == 0,
            "fam.fam_key_bias must be 0 in a recipe; use the key_bias section, which ends at 0",
        )

    def _require_instructions(self) -> None:
        """Refuse packed instructions together with what only passkeys have, and held-out texts without them."""
        if self.evaluation is not None:
            self.evaluation.require_held_out(self.instructions)
        if self.instructions is None:
            return
        default = {"curriculum": (), "stored_blocks": 0, "repeat_updates": (0, 0), "gradient_tokens": None}
        for name, value in default.items():
            require(
                getattr(self.schedule, name) == value,
                f"schedule.{name} is given with instructions, which have no filler and no question; leave it out",
            )
        require(
            self.loss.teacher == 0 and self.state_passing.ask_later == 0 and not self.state_passing.before_question,
            "loss.teacher, state_passing.ask_later or state_passing.before_question is given with instructions, "
            "which have no key to query; leave it out",
        )

    @property
    def text_files(self) -> dict[str, tuple[str, ...]]:
        """The texts that are trained on and held out, by the keys that name them."""
        trained = () if self.instructions is None else self.instructions.files
        held_out = () if self.evaluation is None else self.evaluation.files
        return {"instructions.files": trained, "evaluation.files": held_out}

    def _require_task(self) -> None:
        """Refuse stages that the task does not have, and a teacher or stored filler that its rows do not serve."""
        for number, stage in enumerate(self.schedule.curriculum):
            fixed = [name for name in stage.data if name in self.data.fixed_keys]
            if fixed and any(stage.data[name] != getattr(self.data, name) for name in fixed):
                raise RecipeError(
                    f"schedule.curriculum.{number}.data has {fixed[0]}, which is the same in all stages; set "
                    f"data.{fixed[0]}, and leave it out here"
                )
            try:
                self.data_of(stage)
            except RecipeError as error:
                raise RecipeError(f"schedule.curriculum.{number}: {error}") from error
        task = self.data.task
        require(
            self.loss.teacher == 0 or self.data.can_be_taught,
            f"loss.teacher is above 0 and data.task is {task!r}, which has no single key to teach; leave it out",
        )
        require(
            self.schedule.stored_blocks == 0 or self.data.can_be_stored,
            f"schedule.stored_blocks is above 0 and data.task is {task!r}, which gives more than one key; set it to 0",
        )
        require(
            self.schedule.gradient_tokens is None or self.data.can_be_cut,
            f"schedule.gradient_tokens is given and data.task is {task!r}, whose answers may precede the last "
            "tokens of a block and would not be predicted; leave it out",
        )

    def data_of(self, stage: Stage) -> TaskSection:
        """Return the section `data` as a stage of the curriculum changes it.

        Raises:
            RecipeError: the stage has a key that the task does not have, or a wrong value.
        """
        return build_data(self.data.model_dump() | stage.data)

    def _require_rival(self) -> None:
        """Refuse a rival together with FAM, or with what only FAM has."""
        if self.rival is None:
            return
        fam = self.fam
        is_plain = fam.fam_length == fam.num_memory_segments == fam.num_sink_tokens == 0 and fam.window is None
        require(
            is_plain and self.rival.block_size == fam.block_size,
            f"rival.block_size is {self.rival.block_size}, required is fam.block_size ({fam.block_size}), and a fam "
            "section without FAM, memory segments, sink tokens or window, since the rival replaces them; set "
            "fam.fam_length = 0",
        )
        require(
            self.lora is None and self.model.memory is None and self.key_bias is None and not self.schedule.block_sizes,
            "lora, model.memory, key_bias or schedule.block_sizes is given with a rival, which is trained in full, "
            "from its own start, in segments of one size; leave it out",
        )
        require(
            self.schedule.gradient_tokens is None and self.loss.fam_change == 0,
            "schedule.gradient_tokens or loss.fam_change is given with a rival, and they apply to FAM alone; leave it "
            "out",
        )

    @property
    def memory_config(self) -> FamConfig | RivalConfig:
        """The configuration of the memory that is trained."""
        return self.fam if self.rival is None else self.rival

    @property
    def has_passable_memory(self) -> bool:
        """Whether there is a memory of fixed size, which state passing can hand on."""
        return self.fam.fam_length > 0 if self.rival is None else rival_class(self.rival.system).has_memory

    def _require_parts(self) -> None:
        """Refuse batches and weights that cannot be split, or held in another type, as the recipe says."""
        require(
            self.model.dtype == "float32" or (self.lora is not None and self.rival is None),
            f"model.dtype is {self.model.dtype!r}, required is 'float32' where all weights, or those of a rival, are "
            "trained; add a lora section, or leave model.dtype out",
        )
        require(
            not self.schedule.shard or self.optimizer.kind == "adamw",
            "schedule.shard is true and optimizer.kind is 'adafactor', whose row and column sums are not sharded; "
            "set optimizer.kind = 'adamw'",
        )
        parts = self.schedule.accumulate
        require(
            parts >= 1 and self.schedule.batch_size % parts == 0,
            f"schedule.accumulate is {parts}, required is at least 1 and a divisor of schedule.batch_size "
            f"({self.schedule.batch_size})",
        )
        require(
            parts == 1
            or not (
                self.schedule.stored_blocks or self.loss.teacher or self.loss.full_attention or self.loss.fam_change
            ),
            "schedule.accumulate is above 1 with schedule.stored_blocks, loss.teacher, loss.full_attention or "
            "loss.fam_change, whose "
            "means are over the whole batch; set them to 0, or schedule.accumulate to 1",
        )

    def _require_auxiliary(self) -> None:
        """Refuse auxiliary losses where there is nothing to compute them from."""
        wanted = self.loss.diversity or self.loss.reconstruction
        require(
            not wanted or (self.fam.fam_length > 0 and self.schedule.stored_blocks == 0),
            "loss.diversity or loss.reconstruction is above 0, required is fam.fam_length above 0 and no "
            "schedule.stored_blocks",
        )
        require(
            not self.loss.reconstruction
            or (
                self.fam.is_papers_update
                and self.fam.fam_query_position == "current"
                and self.fam.fam_position != "zero"
            ),
            "loss.reconstruction is above 0, required is the paper's update (fam_update, fam_query, fam_residual and "
            "fam_feeds as by default), fam.fam_query_position = 'current' and a "
            "fam.fam_position other than 'zero', so that the updated FAM is where its query was",
        )

    def _require_updates(self) -> None:
        """Refuse repeated updates and stored filler where there is no FAM to update, or what they cannot serve."""
        require(
            self.schedule.repeat_updates[1] == 0 or self.fam.num_memory_segments == 0,
            f"schedule.repeat_updates is above 0 and fam.num_memory_segments is {self.fam.num_memory_segments}, "
            "required is 0, since a repeated block would be in the memory segments twice",
        )
        require(
            self.schedule.repeat_updates[1] == 0 or self.fam.fam_length > 0,
            "schedule.repeat_updates is above 0 but fam.fam_length is 0: there is no FAM to update; "
            "set schedule.repeat_updates = [0, 0]",
        )
        require(
            self.schedule.stored_blocks >= 0 and self.schedule.steps_per_stored_block >= 1,
            f"schedule.stored_blocks is {self.schedule.stored_blocks} and steps_per_stored_block "
            f"{self.schedule.steps_per_stored_block}, required is at least 0 and at least 1",
        )
        if self.schedule.stored_blocks > 0:
            self._require_packable()

    def _require_passable(self) -> None:
        """Refuse a state passing that has nothing to pass, or that never starts."""
        start_stage, num_stages = self.state_passing.start_stage, len(self.schedule.curriculum)
        require(
            start_stage is None or start_stage < max(1, num_stages),
            f"state_passing.start_stage is {start_stage}, required is below the number of stages ({num_stages}), "
            "which count from 0",
        )
        require(
            self.state_passing.probability == 0 or self.has_passable_memory,
            f"state_passing.probability is above 0 but {self._system} has no memory of fixed size to pass; "
            "set state_passing.probability = 0",
        )

    def _require_packable(self) -> None:
        """Refuse what a batch on stored filler cannot do."""
        fam, why = self.fam, "schedule.stored_blocks is above 0, required is"
        is_plain = fam.is_papers_update and fam.fam_lora == "all" and fam.fam_layers is None
        is_plain &= fam.num_memory_slots == 0 and fam.num_previous_fams == 1 and not fam.fam_starts_empty
        require(
            is_plain and fam.fam_length > 0 and fam.fam_position != "zero",
            f"{why} a fam section with fam_length above 0, all layers, the paper's update, fam_lora 'all', a "
            "position other than 'zero', and no memory segments, sink tokens or further previous FAMs, which hold no "
            "stored filler",
        )
        require(
            self.loss.fam_change == 0 and self.schedule.gradient_tokens is None,
            f"{why} loss.fam_change = 0 and no schedule.gradient_tokens: stored filler has no gradient",
        )

    @property
    def _system(self) -> str:
        return "fam.fam_length = 0" if self.rival is None else f"rival.system = {self.rival.system!r}"

    @property
    def reading_config(self) -> FamConfig:
        """The configuration that the trained memory is kept with."""
        changes = {name: value for name, value in self.reading.model_dump().items() if value is not None}
        return self.fam.replace(**changes)

    @property
    def max_filler_tokens(self) -> int:
        """Most tokens of filler between key and question in one sequence, in the largest block that is drawn."""
        longer = max(self.schedule.block_sizes, default=self.fam.block_size) - self.fam.block_size
        return longer + max((stage.filler_tokens[1] for stage in self.schedule.curriculum), default=0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values that `build_recipe` takes back."""
        return json.loads(json.dumps(self.model_dump()))
