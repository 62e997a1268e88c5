"""Preference flags: other trainers' flags for preferences and rewards, in those of `Config`.

They are RWKV-LM-RLHF's `--dpo 1 --dpo_beta 0.01` and the names of TRL's losses. A flag with the same meaning
under another name is an alias in schema.py. docs/preferences.md translates the values.
"""

from __future__ import annotations

from collections.abc import Mapping

from rwkv_miss.errors import UserError

from .flag_values import is_on, value
from .notes import Notes

# RWKV-LM-RLHF: the flag that turns a loss on, and its numbers with the defaults there and today's names
SWITCHES = {
    "dpo": {"dpo_beta": ("beta", "0.01"), "dpo_alpha": ("sft_weight", "0.1")},
    "orpo": {"orpo_alpha": ("orpo_lambda", "0.01")},
    "simpo": {"simpo_beta": ("beta", "0.01"), "simpo_alpha": ("", "")},
    "grpo": {
        "grpo_gen_count": ("group_size", "4"),
        "grpo_gen_length": ("max_tokens", "1024"),
        "grpo_kl_beta": ("beta", "0.1"),
    },
}
# flags that a loss needs in addition to its numbers; newer versions there divide dpo by the tokens
MORE = {"dpo": ["--loss_average", "mean"], "simpo": ["--simpo_gamma", "0"], "grpo": ["--grpo_type", "grpo"]}
# flags without an effect here
IGNORED = {
    "simpo_alpha": "it multiplied the whole loss, which the optimizer divides out again",
    "orpo_mode": "there is one way to compute it",
    "rlhf_max_corpus_len": "--ctx_len bounds a row, which holds both answers of a pair",
    "dpo_general_corpus_ratio": "--sft_weight keeps the right answers likely; for other texts, train twice",
}
# flags of IGNORED whose effect there is missing here
OTHER_RESULT = {"dpo_general_corpus_ratio"}
# files of tokens, and their sources
TOKENISED = {
    **dict.fromkeys(
        ("rlhf_train_file", "dpo_train_file"),
        "the CSV that it was made of, with the columns prompt,chosen,reject",
    ),
    "train_data_file": "the JSONL that it was made of",
}
QUESTIONS = "questions as JSONL, with the columns prompt and completion, the right answer"  # data for grpo
NUMBERS = {name: to for numbers in SWITCHES.values() for name, (to, _) in numbers.items() if to}
# TRL's losses -> flags here
LOSS_TYPES = {
    "sigmoid": ["--loss", "dpo"],
    "sigmoid_norm": ["--loss", "dpo", "--loss_average", "mean"],
    **{name: ["--loss", name] for name in ("ipo", "orpo", "simpo", "kto")},
    **{name: ["--loss", "grpo", "--grpo_type", name] for name in ("dapo", "grpo", "dr_grpo")},
    # the mean over the tokens of a micro-batch, here over those of the step: equal where that is one of them
    "bnpo": ["--loss", "grpo", "--grpo_type", "dapo"],
}
# TRL's --scale_rewards -> --advantage_scale
SCALES = {"group": "group", "true": "group", "none": "none", "false": "none"}
OF_TRL = ("loss_type", "pref_loss")  # the flag of the loss in TRL, and in LLaMA-Factory

# TRL's flags about drawing -> the values that leave the distribution whole
DRAWING_FLAGS = {"temperature": ("1", "1.0"), "top_p": ("1", "1.0"), "top_k": ("0", "-1")}

NAMES = {*SWITCHES, *IGNORED, *TOKENISED, *NUMBERS, *OF_TRL, *DRAWING_FLAGS, "wpo", "scale_rewards"}


def preference(old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    """Translate the preference flags in `old`, with a note for each."""
    if is_on(old, "wpo"):
        raise UserError("--wpo weighs pairs in a way that is not here; use --loss dpo or simpo")
    for name in [name for name in IGNORED if name in old]:
        part = notes.differences if name in OTHER_RESULT else notes.translations
        part.append(f"--{name} is ignored: {IGNORED[name]}")
    on = [name for name in SWITCHES if is_on(old, name)]
    if len(on) > 1:
        raise UserError(f"--{on[0]} and --{on[1]} were given; choose one --loss")
    new = _loss_type(old, notes)
    if on:
        new += _switched_on(on[0], old, kept, notes)
    new += _file(old, kept, new, notes)
    for name, today in NUMBERS.items():
        if name in old and not (on and name in SWITCHES[on[0]]):
            notes.translations.append(f"--{name} is --{today}")
            new += [f"--{today}", old[name]]
    _check_drawing(old, value([*kept, *new], "loss"), notes)
    return new + _scale_rewards(old, notes)


def _switched_on(loss: str, old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    """Translate `--dpo 1` and its numbers; numbers that are not given have their defaults there."""
    new = ["--loss", loss]
    if MORE.get(loss) and value(kept, MORE[loss][0].removeprefix("--")) is None:
        new += MORE[loss]
    for name, (today, default) in SWITCHES[loss].items():
        if today:
            new += [f"--{today}", old.get(name) or default]
    notes.translations.append(f"--{loss} is {' '.join(new)}, as in RWKV-LM-RLHF")
    if loss == "grpo" and value(kept, "rewards") is None:
        notes.differences.append(
            "the rewards there are for the tags <think> and <answer>; here --rewards, else exact"
        )
    return new


def _file(old: Mapping[str, str], kept: list[str], new: list[str], notes: Notes) -> list[str]:
    """Give --data_file for a folder of JSONL. Refuse a file of tokens, unless --data_file replaces it."""
    for name, made_of in TOKENISED.items():
        if name in old and value(kept, "data_file"):
            notes.translations.append(f"--{name} is ignored: --data_file is given")
        elif name in old and name == "train_data_file" and is_on(old, "sft_jsonmode"):
            notes.differences.append(
                f"--{name} is --data_file {old[name]}, a folder of JSONL. All its tokens are trained there;"
                " here the answers, or all with --loss_mask all"
            )
            return ["--data_file", old[name]]
        elif name in old:
            if value([*kept, *new], "loss") == "grpo":
                made_of = QUESTIONS
            same = f"; the rest of the command is {' '.join(new)} here" if new else ""
            raise UserError(
                f"--{name} {old[name]} is a file of tokens that RWKV-LM-RLHF made; give {made_of}, as"
                f" --data_file{same}"
            )
    return []


def _check_drawing(old: Mapping[str, str], loss: str | None, notes: Notes) -> None:
    """Raise UserError for another distribution than the model's own."""
    if loss == "distill" and "temperature" in old:
        raise UserError(
            f"--temperature {old['temperature']}: --loss distill draws no answers; the temperature of its KL"
            f" is --distill_temperature {old['temperature']}"
        )
    for name, whole in DRAWING_FLAGS.items():
        if name in old and old[name] not in whole:
            raise UserError(
                f"--{name} {old[name]}: rollouts use temperature 1 and the whole distribution, the only one"
                " whose ln p the training knows; drop the flag"
            )
        if name in old:
            notes.translations.append(f"--{name} {old[name]} is ignored: answers are always drawn so")


def _scale_rewards(old: Mapping[str, str], notes: Notes) -> list[str]:
    """Translate TRL's word for the divisor of the advantages."""
    given = old.get("scale_rewards")
    if given is None:
        return []
    if given.lower() not in SCALES:
        raise UserError(
            f"--scale_rewards {given}: rewards are divided by the deviation of their own group, or not at"
            " all; give --advantage_scale group or none"
        )
    new = ["--advantage_scale", SCALES[given.lower()]]
    notes.translations.append(f"--scale_rewards {given} is {' '.join(new)}")
    return new


def _loss_type(old: Mapping[str, str], notes: Notes) -> list[str]:
    for name in OF_TRL:
        if name not in old:
            continue
        if old[name] not in LOSS_TYPES:
            raise UserError(
                f"--{name} {old[name]}: of these losses {', '.join(LOSS_TYPES)} are here; sigmoid with"
                " --label_smoothing is the conservative DPO"
            )
        notes.translations.append(f"--{name} {old[name]} is {' '.join(LOSS_TYPES[old[name]])}")
        return list(LOSS_TYPES[old[name]])
    return []
