"""Learning rates of RWKV-LM's, RWKV-PEFT's and RWKV-LM-RLHF's scripts, in the flags of `Config`.

Without a flag RWKV-PEFT until early 2025 and RWKV-LM-RLHF decay exponentially, and in a straight line where
one end is 0. Later RWKV-PEFT decays as a cosine, and RWKV-LM where it has --my_exit_tokens. RWKV-PEFT's wsd
is a warm-up and a cosine to 0. All warm up only where they are told to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from .flag_values import integer, number, of_2026, stage, value, version
from .notes import Notes

LR_FINAL = 1e-5  # in all of them
WSD_WARM_UP = 100
# RWKV-PEFT's flags since it has cosines, and flags from shortly before
WITH_COSINES = ("lr_schedule", "op", "optimizer")
EARLY_2025 = ("disha_config", "rwkv_version")
COSINES = (None, "cos", "cos_decay")


def schedule(old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    """Give --lr_schedule and --lr_final, if the rate changes at all."""
    first, last = number(kept, "lr_init"), number(kept, "lr_final")
    new: list[str] = []
    if math.isnan(last) and not math.isnan(first):
        last, new = LR_FINAL, ["--lr_final", str(LR_FINAL)]
        notes.translations.append(f"no --lr_final is --lr_final {LR_FINAL:g}, as there")
    named = value(kept, "lr_schedule")
    if math.isnan(first) or last < 0 or first == last or named not in (*COSINES, "wsd"):
        return new
    if stage(old) != "0" or integer(old, "my_exit_tokens", 0):
        return new
    cosine, exponential = (first + last) / 2, math.sqrt(first * last)  # halfway
    if named == "wsd":
        notes.translations.append(
            "--lr_schedule wsd is a warm-up and a cosine to 0 there: --lr_schedule cos --lr_final 0, which is"
            f" {first / 2:g} halfway"
        )
        return ["--lr_schedule", "cos", "--lr_final", "0"]
    newest = of_2026(old, kept)
    if not newest and old.keys() & set(EARLY_2025):
        notes.differences.append(
            f"the rate is a cosine, {cosine:g} halfway, as since the middle of 2025 there; before, it was"
            f" --lr_schedule exp, {exponential:g} halfway"
        )
    elif not newest and not any(value(kept, name) or name in old for name in WITH_COSINES):
        shape, halfway = ("linear", cosine) if 0 in (first, last) else ("exp", exponential)
        notes.translations.append(
            f"the rate decays so there: --lr_schedule {shape}, which is {halfway:g} halfway"
        )
        return [*new, "--lr_schedule", shape]
    return [*new, "--lr_schedule", "cos"]


def warm_up(old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    """Give --warmup_steps if none are given, because otherwise a run here chooses their number."""
    if value(kept, "warmup_steps") not in (None, "-1"):
        return []
    steps = WSD_WARM_UP if value(kept, "lr_schedule") == "wsd" else 0
    notes.translations.append(f"--warmup_steps {steps}, as there where no number is given")
    return ["--warmup_steps", str(steps)]


def base_decay(old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    """Give w0 of a fully trained RWKV-7 the usual rate: RWKV-PEFT doubles RWKV-6's time_decay alone."""
    if value(kept, "peft") != "none" or version(old, kept) != "x070" or stage(old) != "0":
        return []
    if value(kept, "lr_map") is not None:
        return []
    notes.translations.append(
        "w0, the base decay, learns at the usual rate there, and here at twice that: --lr_map att.w0=0.5"
    )
    return ["--lr_map", "att.w0=0.5"]
