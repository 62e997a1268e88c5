"""Settings of a run about its loss: its kind, preferences between answers, and rewards."""

from __future__ import annotations

import dataclasses

from ..common.option import opt
from .data_settings import DataSettings

# losses on preferences; --loss also takes sft, the usual one, those with a teacher, and grpo, on rewards
LOSSES = ("dpo", "ipo", "orpo", "simpo", "kto")
TAUGHT = ("distill", "distill_on_policy")  # with a teacher
DRAWING = ("distill_on_policy", "grpo")  # on answers that the model draws
# built-in rewards of --loss grpo (src/evaluation/rewards.py); others are functions of --reward_file
REWARDS = ("exact", "number", "boxed", "math_verify", "partial", "regex", "length")


@dataclasses.dataclass(frozen=True)
class LossSettings(DataSettings):
    """Settings of Config that follow those of the data."""

    loss: str = opt(
        "sft",
        "what is minimised. sft: the cross entropy of the trained tokens. distill: the same, and the KL from"
        " a teacher, the model of --reference (docs/training.md). distill_on_policy: the model answers"
        " questions, and the KL is taken at each token of its own answers. dpo, ipo, orpo or simpo: a"
        " preference between two answers, for rows with chosen and rejected. kto: the same for single"
        " answers, with label true or false. docs/preferences.md says which is for what. grpo: the model"
        " answers questions, and learns from the rewards of its answers (docs/rewards.md)",
        choices=("sft", *TAUGHT, *LOSSES, "grpo"),
    )
    beta: float = opt(
        0.0,
        "dpo, ipo and kto: how closely the model is held to the reference, above 0. simpo: the scale"
        " of the reward. Left out: 0.1 for dpo, ipo and kto, 2 for simpo. orpo has --orpo_lambda. grpo:"
        " the weight of the KL to the reference. Left out: 0, no KL",
        alias=("pref_beta",),
        automatic=True,
        low=0,
        high=1e30,
    )
    sft_weight: float = opt(
        -1.0,
        "the weight of the cross entropy of the chosen answer, per token, beside the preference. At"
        " weight 0 right answers can get lost while the accuracy rises. -1: 1, and 1 / beta for ipo",
        alias=("rpo_alpha", "pref_ftx"),
        automatic=True,
        low=-1,
        high=1e30,
    )
    loss_average: str = opt(
        "sum",
        "what dpo compares. sum: the log-probability of an answer, as in the paper. mean: the"
        " log-probability per token. ipo, orpo and simpo always take the mean, and kto the sum",
        choices=("sum", "mean"),
    )
    label_smoothing: float = opt(
        0.0,
        "for dpo and simpo: the share of pairs whose answers are taken to be the wrong way round",
        low=0,
        below=0.5,
    )
    simpo_gamma: float = opt(
        1.0,
        "simpo: by how much the reward of the chosen answer should be above the other's",
        low=0,
        high=1e30,
    )
    orpo_lambda: float = opt(
        0.1, "orpo: the weight of the odds ratio beside the cross entropy", low=0, high=1e30
    )
    desirable_weight: float = opt(1.0, "kto: the weight of the answers with label true", low=0, high=1e30)
    undesirable_weight: float = opt(1.0, "kto: the weight of the answers with label false", low=0, high=1e30)
    reference: str = opt(
        "",
        "the reference model of dpo, ipo, kto and the KL of grpo, and the teacher of distill and"
        " distill_on_policy, of any size: a file, a folder or a name of the hub, as for --load_model. Empty:"
        " the base model, with the adapter off; a teacher must be given",
        alias=("ref_model",),
        file=True,
    )
    distill_top: int = opt(
        64,
        "distill: the number of likeliest tokens that are kept of the teacher at each trained token. All"
        " others count as one",
        low=1,
        high=2**16,
    )
    distill_temperature: float = opt(
        2.0,
        "distill, distill_on_policy: the temperature of the teacher's and the model's probabilities in the"
        " KL. Above 1 unlikely tokens count more",
        alias=("kd_temperature",),
        low=0.01,
        high=1000,
    )
    distill_mix: float = opt(
        0.9,
        "distill: the weight of the KL; the cross entropy has 1 minus that",
        low=0,
        high=1,
    )

    rewards: dict = opt(
        {},
        "grpo: what a rollout is rewarded for, with weights: exact=1,partial=0.5. A name alone has the"
        " weight 1. exact, number, boxed or math_verify: 1 for a right answer, judged as by"
        " scripts.evaluate. partial: the share of characters in the right place. regex: 1 if"
        " --reward_regex is found. length: 0, and less for rollouts above --reward_length. Another"
        " name: the function of this name in --reward_file. A reward of weight 0 is shown and not"
        " trained on. Empty: exact=1",
        automatic=True,
        bare=1.0,
    )
    reward_file: str = opt(
        "",
        "grpo: a Python file with functions NAME(prompt, answers, right). Each returns a list of"
        " numbers, one for each answer; right is the reference answer. Parameters cut and tokens after these"
        " get which answers were cut, and their tokens. The file's code is run, so only the command line"
        " can name it, and no YAML file",
        operator=True,
    )
    reward_regex: str = opt(
        "", "grpo: the regular expression of --rewards regex, searched for in the rollout"
    )
    reward_length: int = opt(
        0,
        "grpo: the longest rollout, in tokens, that --rewards length gives 0. A longer one gets less,"
        " down to -1 at --max_tokens",
        low=0,
    )
    reward_timeout: float = opt(
        10.0,
        "grpo: seconds that the functions of --reward_file have for the rollouts of one question. Then"
        " they are stopped, and the question is left out of the step",
        low=0.1,
        high=1e6,
    )
    group_size: int = opt(
        8,
        "grpo, distill_on_policy: rollouts of each question; grpo needs 2 or more",
        alias=("num_generations",),
        low=1,
        high=2**16,
    )
    max_tokens: int = opt(
        0,
        "grpo, distill_on_policy: the longest rollout, in tokens. A rollout that has no end by then is cut."
        " 0: for exact and partial, and with a teacher, 1.25 times the longest reference answer, plus 16; for"
        " other rewards see docs/rewards.md. It must fit into --ctx_len",
        alias=("max_completion_length",),
        automatic=True,
        low=0,
    )
    grpo_type: str = opt(
        "dapo",
        "grpo: how the losses of tokens are put together. dapo: the mean over all tokens of the step. grpo:"
        " the mean over an answer, then over the answers, so that a token of a long answer counts less."
        " dr_grpo: the sum over --max_tokens, then the mean over the answers",
        choices=("dapo", "grpo", "dr_grpo"),
    )
    clip_low: float = opt(
        0.2,
        "grpo: a token that has lost more than this share of its probability since the rollout is not"
        " pushed down any further",
        alias=("epsilon",),
        low=0,
        high=1,
    )
    clip_high: float = opt(
        0.0,
        "grpo: a token that has gained more than this share of its probability since the rollout is"
        " not pushed up any further. 0: 0.28 for --grpo_type dapo, else the value of --clip_low",
        alias=("epsilon_high",),
        automatic=True,
        low=0,
        high=1e30,
    )
    advantage_scale: str = opt(
        "auto",
        "grpo: how advantages are scaled. group: the rewards of a question, minus their mean, are"
        " divided by their standard deviation. none: they are not divided. auto: none for --grpo_type"
        " dr_grpo, else group",
        choices=("auto", "group", "none"),
        automatic=True,
    )
    inner_steps: int = opt(
        1,
        "grpo, distill_on_policy: optimizer steps on the same rollouts. More steps need fewer rollouts, and"
        " learn from answers that are no longer the model's own",
        alias=("num_iterations",),
        low=1,
    )

    @property
    def on_preferences(self) -> bool:
        """Tell whether the loss compares answers in the data."""
        return self.loss in LOSSES

    @property
    def has_teacher(self) -> bool:
        """Tell whether the loss compares with a teacher."""
        return self.loss in TAUGHT

    @property
    def is_supervised(self) -> bool:
        """Tell whether the loss is on documents."""
        return self.loss in ("sft", "distill")

    @property
    def on_rewards(self) -> bool:
        """Tell whether the model learns from the rewards of answers that it draws itself."""
        return self.loss == "grpo"

    @property
    def draws_answers(self) -> bool:
        """Tell whether the model learns from answers that it draws itself."""
        return self.loss in DRAWING
