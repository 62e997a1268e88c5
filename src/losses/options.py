"""Options that several losses share; a loss's own are in its file.

Loss.helps says what one is for a loss, where that is not the text here.
"""

from __future__ import annotations

import dataclasses
import os

from rwkv_miss.files.hub_names import recorded

from ..common.option import opt


@dataclasses.dataclass(frozen=True)
class Beta:
    beta: float = opt(
        0.0,
        "how closely the model is held to the reference, above 0. Left out: 0.1",
        alias=("pref_beta",),
        automatic=True,
        low=0,
        high=1e30,
    )


@dataclasses.dataclass(frozen=True)
class Reference:
    reference: str = opt(
        "",
        "A file, a folder or a name of the hub, as for --load_model. Empty: the base model, with the"
        " adapter off",
        alias=("ref_model",),
        file=True,
    )

    @property
    def reference_name(self) -> str:
        """Name of the reference in texts: the last part of its path."""
        return os.path.basename(recorded(self.reference).rstrip("/"))


@dataclasses.dataclass(frozen=True)
class Teacher(Reference):
    distill_temperature: float = opt(
        2.0,
        "the temperature of the teacher's and the model's probabilities in the"
        " KL. Above 1 unlikely tokens count more",
        alias=("kd_temperature",),
        low=0.01,
        high=1000,
    )


@dataclasses.dataclass(frozen=True)
class SftWeight:
    sft_weight: float = opt(
        -1.0,
        "the weight of the cross entropy of the chosen answer, per token, added to the preference. At"
        " weight 0 right answers can get lost while the accuracy rises. -1: 1, and 1 / beta for ipo",
        alias=("rpo_alpha", "pref_ftx"),
        automatic=True,
        low=-1,
        high=1e30,
    )


@dataclasses.dataclass(frozen=True)
class Smoothing:
    label_smoothing: float = opt(
        0.0,
        "the share of pairs whose answers are taken to be the wrong way round",
        low=0,
        below=0.5,
    )


@dataclasses.dataclass(frozen=True)
class Draws:
    group_size: int = opt(
        8,
        "rollouts of each question; grpo needs 2 or more",
        alias=("num_generations",),
        low=1,
        high=2**16,
    )
    max_tokens: int = opt(
        0,
        "the longest rollout, in tokens. A rollout that has no end by then is cut."
        " 0: for exact and partial, and with a teacher, 1.25 times the longest reference answer, plus 16; for"
        " other rewards see docs/rewards.md. It must fit into --ctx_len",
        alias=("max_completion_length",),
        automatic=True,
        low=0,
    )
    inner_steps: int = opt(
        1,
        "optimizer steps on the same rollouts. More steps need fewer rollouts, and"
        " learn from answers that are no longer the model's own",
        alias=("num_iterations",),
        low=1,
    )
