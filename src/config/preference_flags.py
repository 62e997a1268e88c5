"""The flags of other trainers for preferences and rewards, in those of `Config`.

They are RWKV-LM-RLHF's `--dpo 1 --dpo_beta 0.01` and the names of TRL's losses. What has the same meaning
under another name is an alias in schema.py. docs/preferences.md translates the values.
"""

from __future__ import annotations

from collections.abc import Mapping

from rwkv_miss.errors import UserError

# RWKV-LM-RLHF: the flag that turns a loss on, and its numbers with the defaults there and today's names
SWITCHES = {
    "dpo": {"dpo_beta": ("beta", "0.01"), "dpo_alpha": ("sft_weight", "0.1")},
    "orpo": {"orpo_alpha": ("orpo_lambda", "0.01")},
    "simpo": {"simpo_beta": ("beta", "0.01"), "simpo_alpha": ("", "")},
}
# what changes nothing else there
IGNORED = {
    "simpo_alpha": "it multiplied the whole loss, which the optimizer divides out again",
    "orpo_mode": "there is one way to compute it",
    "rlhf_max_corpus_len": "--ctx_len bounds a row, which holds both answers of a pair",
    "dpo_general_corpus_ratio": "--sft_weight keeps the right answers likely; for other texts, train twice",
}
TOKENISED = ("rlhf_train_file", "dpo_train_file")
NUMBERS = {name: to for numbers in SWITCHES.values() for name, (to, _) in numbers.items() if to}
# TRL's losses, for --loss and what goes with it
LOSS_TYPES = {
    "sigmoid": ["--loss", "dpo"],
    "sigmoid_norm": ["--loss", "dpo", "--loss_average", "mean"],
    **{name: ["--loss", name] for name in ("ipo", "orpo", "simpo", "kto")},
    **{name: ["--loss", "grpo", "--grpo_type", name] for name in ("dapo", "grpo", "dr_grpo")},
    # the mean over the tokens of a micro-batch, here over those of the step: equal where that is one of them
    "bnpo": ["--loss", "grpo", "--grpo_type", "dapo"],
}
# its --scale_rewards, for --advantage_scale
SCALES = {"group": "group", "true": "group", "none": "none", "false": "none"}
OF_TRL = ("loss_type", "pref_loss")  # its name in TRL, and in LLaMA-Factory

# its flags about drawing, and the values that leave the distribution whole
DRAWING = {"temperature": ("1", "1.0"), "top_p": ("1", "1.0"), "top_k": ("0", "-1")}

NAMES = {*SWITCHES, *IGNORED, *TOKENISED, *NUMBERS, *OF_TRL, *DRAWING, "wpo", "scale_rewards"}


def preference(old: Mapping[str, str], kept: list[str], notes: list[str]) -> list[str]:
    """Flags of today for what `old` has of preferences, with a note for each."""
    for name in TOKENISED:
        if name in old:
            raise UserError(
                f"--{name} {old[name]} is a file of tokens that RWKV-LM-RLHF made; give the CSV that it was"
                " made of, with the columns prompt,chosen,reject, as --data_file"
            )
    if old.get("wpo", "0") != "0":
        raise UserError("--wpo weighs pairs in a way that is not here; use --loss dpo or simpo")
    notes += [f"--{name} is ignored: {reason}" for name, reason in IGNORED.items() if name in old]
    on = [name for name in SWITCHES if old.get(name, "0") != "0"]
    if len(on) > 1:
        raise UserError(f"--{on[0]} and --{on[1]} were given; choose one --loss")
    new = _loss_type(old, notes)
    if on:
        new += _switched_on(on[0], old, kept, notes)
    for name, today in NUMBERS.items():
        if name in old and not (on and name in SWITCHES[on[0]]):
            notes.append(f"--{name} is --{today}")
            new += [f"--{today}", old[name]]
    _check_drawing(old, notes)
    return new + _scale_rewards(old, notes)


def _switched_on(loss: str, old: Mapping[str, str], kept: list[str], notes: list[str]) -> list[str]:
    """`--dpo 1` and its numbers, those that are not given with their defaults there."""
    new = ["--loss", loss]
    if loss == "dpo":
        new += ["--loss_average", "mean"]  # newer versions there divide by the tokens
    if loss == "simpo" and not any(word.partition("=")[0] == "--simpo_gamma" for word in kept):
        new += ["--simpo_gamma", "0"]
    for name, (today, default) in SWITCHES[loss].items():
        if today:
            new += [f"--{today}", old.get(name) or default]
    notes.append(f"--{loss} is {' '.join(new)}, as in RWKV-LM-RLHF")
    return new


def _check_drawing(old: Mapping[str, str], notes: list[str]) -> None:
    """Another distribution than the model's own is an error."""
    for name, whole in DRAWING.items():
        if name in old and old[name] not in whole:
            raise UserError(
                f"--{name} {old[name]}: answers are drawn at temperature 1 from the whole distribution, the"
                " only one of which the training knows ln p; drop the flag"
            )
        if name in old:
            notes.append(f"--{name} {old[name]} is ignored: answers are always drawn so")


def _scale_rewards(old: Mapping[str, str], notes: list[str]) -> list[str]:
    """TRL's word for the divisor of the advantages."""
    given = old.get("scale_rewards")
    if given is None:
        return []
    if given.lower() not in SCALES:
        raise UserError(
            f"--scale_rewards {given}: rewards are divided by the deviation of their own group, or not at"
            " all; give --advantage_scale group or none"
        )
    new = ["--advantage_scale", SCALES[given.lower()]]
    notes.append(f"--scale_rewards {given} is {' '.join(new)}")
    return new


def _loss_type(old: Mapping[str, str], notes: list[str]) -> list[str]:
    for name in OF_TRL:
        if name not in old:
            continue
        if old[name] not in LOSS_TYPES:
            raise UserError(
                f"--{name} {old[name]}: of these losses {', '.join(LOSS_TYPES)} are here; sigmoid with"
                " --label_smoothing is the conservative DPO"
            )
        notes.append(f"--{name} {old[name]} is {' '.join(LOSS_TYPES[old[name]])}")
        return list(LOSS_TYPES[old[name]])
    return []
