"""Loggers of a run's numbers besides its own files.

They go to TensorBoard if it is installed, and to Weights & Biases on request.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Protocol

from rwkv_miss.errors import UserError

from ..common.files import write_text
from ..config import FIELDS, Settled

TENSORBOARD, WANDB_ID = "tensorboard", "wandb-id.txt"


class Writer(Protocol):
    """Interface of a logger for StepReport and Watch, on rank 0."""

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Log values of a step under names such as train/loss."""

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Log answers of the model: prompt, answer, the reference answer, and the reward, if it has one."""

    def close(self, failed: bool) -> None:
        """End the log."""


class TensorBoard:
    """Event files in proj_dir/tensorboard; those of steps that a resumed run repeats are hidden."""

    def __init__(self, proj_dir: str, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.folder = os.path.join(proj_dir, TENSORBOARD)
        self.writer = SummaryWriter(self.folder, purge_step=first_step + 1 if first_step else 0)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        try:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()  # a killed run must not leave a hole in the curve
        except OSError as error:  # the error of the thread that writes
            raise UserError(f"{self.folder} could not be written ({error.strerror})") from None

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        parts = []
        for sample in samples:
            for name, value in sample.items():
                # four spaces are Markdown for text as it is
                parts += [name, "\n".join(f"    {line}" for line in str(value).splitlines())]
        self.writer.add_text("validation/samples", "\n\n".join(parts), step)

    def close(self, failed: bool) -> None:
        self.writer.close()


class WeightsAndBiases:
    """Run of a project in Weights & Biases; a resumed run continues it.

    The key, and staying offline, are wandb's own settings.
    """

    def __init__(self, config: Settled, first_step: int):
        import wandb

        path, known = os.path.join(config.proj_dir, WANDB_ID), None
        if first_step and os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                known = file.read().strip()
        try:
            self.run = wandb.init(
                project=config.wandb,
                dir=config.proj_dir,
                id=known,
                resume="allow",
                config={name: config.written(name) for name in FIELDS},
            )
        except wandb.errors.Error as error:
            raise UserError(f"--wandb {config.wandb}: {error}") from None
        self.table = wandb.Table
        write_text(path, f"{self.run.id}\n")

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        table = self.table(columns=list(samples[0]), data=[list(sample.values()) for sample in samples])
        self.run.log({"validation/samples": table}, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(int(failed))


def check_wandb(project: str) -> None:
    """Raise UserError if --wandb can't work: the package is absent, or has no key and is not offline."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError(f"--wandb {project} needs the package wandb: pip install wandb, or drop the flag")
    import wandb

    try:
        wandb.login()
    except wandb.errors.Error as error:
        raise UserError(
            f"--wandb {project}: {error} With WANDB_MODE=offline the run stays on this machine"
        ) from None


def tensorboard_problem() -> str | None:
    """Say why there is no TensorBoard, or None.

    It is optional, so a broken installation does not end a run.
    """
    if importlib.util.find_spec("tensorboard") is None:
        return "not installed (pip install tensorboard)"
    try:
        import torch.utils.tensorboard  # noqa: F401
    except Exception as error:  # packages that do not fit each other raise anything
        return f"broken here: {error}"
    return None


def open_writers(config: Settled, first_step: int) -> list[Writer]:
    """Open the loggers of a run that goes on after `first_step`."""
    writers: list[Writer] = [] if tensorboard_problem() else [TensorBoard(config.proj_dir, first_step)]
    return [*writers, WeightsAndBiases(config, first_step)] if config.wandb else writers


def places_to_watch(proj_dir: str, wandb: str) -> list[str]:
    """Return the places where the numbers can be seen while they come."""
    places = []
    if not tensorboard_problem():
        places.append(f"tensorboard --logdir {os.path.join(proj_dir, TENSORBOARD)}")
    if wandb:
        places.append(f"Weights & Biases, project {wandb}")
    return places


def absent_writers() -> list[str]:
    """Write the line of the plan's details about a place where the numbers can't be seen, if any."""
    problem = tensorboard_problem()
    return [f"watch it   TensorBoard {problem}"] if problem else []
