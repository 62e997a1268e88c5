"""Settings of a run about its loss: the choice, and the options that the losses of src/losses declare."""

from __future__ import annotations

import copy
import dataclasses

from ..common.option import opt
from ..losses import LOSSES, help_of, options_of
from ..losses.base import DOCUMENTS, LABELS, PAIRS, QUESTIONS
from .data_settings import DataSettings


@dataclasses.dataclass(frozen=True)
class LossChoice(DataSettings):
    """Settings that follow those of the data."""

    loss: str = opt(
        "sft",
        f"what is minimised. {'. '.join(f'{name}: {loss.about}' for name, loss in LOSSES.items())}."
        " docs/preferences.md says which preference is for what",
        choices=tuple(LOSSES),
    )

    @property
    def on_preferences(self) -> bool:
        """Tell whether the loss compares answers in the data."""
        return LOSSES[self.loss].data in (PAIRS, LABELS)

    @property
    def has_teacher(self) -> bool:
        """Tell whether the loss compares with a teacher."""
        return LOSSES[self.loss].needs_teacher

    @property
    def is_supervised(self) -> bool:
        """Tell whether the loss is on documents."""
        return LOSSES[self.loss].data == DOCUMENTS

    @property
    def on_rewards(self) -> bool:
        """Tell whether the model learns from the rewards of answers that it draws itself."""
        return self.draws_answers and not self.has_teacher

    @property
    def draws_answers(self) -> bool:
        """Tell whether the model learns from answers that it draws itself."""
        return LOSSES[self.loss].data == QUESTIONS


def declared(option: dataclasses.Field, losses: tuple[str, ...]) -> dataclasses.Field:
    """Make the field of a setting from an option of these losses."""
    field = copy.copy(option)
    field.metadata = {**option.metadata, "help": help_of(option, losses)}
    return field


LossSettings = dataclasses.make_dataclass(
    "LossSettings",
    [(name, field.type, declared(field, losses)) for name, (field, losses) in options_of().items()],
    bases=(LossChoice,),
    frozen=True,
)
