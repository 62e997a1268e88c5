"""Command lines of RWKV-LM, RWKV-PEFT and RWKV-LM-RLHF, 2024 to 2026, in the flags of `Config`.

Their scripts run as they stand. A flag that has another name here is translated; one without a meaning here
is named with the reason; one that would change the result, and that this version cannot honour, stops the
run. Defaults of flags that are left out are translated or reported, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from rwkv_miss.errors import UserError

from . import data_flags, method_flags, preference_flags, rate_flags
from .flag_values import integer, integer_of, is_on, of_2026, product, stage, value
from .notes import Notes

# ignored, whatever the value is; with the reason
DROPPED = {
    "data_type": "the format is read from the file",
    "magic_prime": "the data order needs no prime number",
    "epoch_begin": "--resume auto knows where the run stopped",
    "ds_bucket_mb": "the bucket sizes suit adapters as they are",
    "num_workers": "rows are tokenised once and kept in memory",
    "enable_progress_bar": "the bar shows itself on a terminal",
    "persistent_workers": "there are no loader processes",
    "prefetch_factor": "there are no loader processes",
    "load_partial": "every tensor of a checkpoint must be there",
    "fused_kernel": "the best kernel at hand is chosen, see --wkv",
    "fla": "the best kernel at hand is chosen, see --wkv",
    "kernel": "the best kernel at hand is chosen, see --wkv",
    "head_chunk": "the head runs on the trained tokens only",
    "data_shuffle": "every pass over the data is a new permutation",
    "mask_id": "--loss_mask takes the words that it is about",
    "avg_loss": "it is a sum that the log needed",
    "tiny_att_layer": "RWKV-6 and RWKV-7 have no such layer",
    "my_pile_shift": "a pass begins with the first token",
    "my_exit": "--epoch_count tells the end",
    # flags of RWKV-LM-RLHF
    "layer_profile": "--peft, --peft_config and --lr_map choose here what it chose for each layer",
    "lr_advanced": "--lr_map has rates by layer",
    "limited_lora": "--train_parts trains whole tensors with the adapter, such as time,ln",
    "gpu_arch": "torch knows the GPU",
    "random_mode": "every pass over the data is a new permutation",
    "infctx_dataset_multiplier": "--epoch_steps tells the length of an epoch",
    "sft": "it is the usual loss",
    "sft_jsonmode": "the format is read from the file",
    "sft_jsonmode_tokenizermode": "--tokenizer chooses another one than World",
    "state_output_mode": "the state is in the adapter's file",
}

# flags of DROPPED whose effect there is missing here
OTHER_RESULT = {"layer_profile", "lr_advanced", "limited_lora"}

# values that change nothing, and why any other one stops the run
REFUSED = {
    "pre_ffn": (("0",), "RWKV-6 and RWKV-7 have no such layer; drop the flag"),
    "head_qk": (("0",), "RWKV-6 and RWKV-7 have no such head; drop the flag"),
    "dropout": (("0",), "there is no dropout in the model; that of LoRA is in --peft_config"),
    "weight_decay_final": (("-1",), "the weight decay is constant; drop the flag"),
    "layerwise_lr": (("1",), "the decays always learn at twice the rate, as with 1; drop the flag"),
    "tiny_att_dim": (("0", "-1"), "RWKV-6 and RWKV-7 have no such layer; drop the flag"),
    "my_pile_version": (("1",), "several files are --data_file a:1,b:1; drop the flag"),
    "my_pile_edecay": (("0",), "the rate decays from the end of the warm-up on; drop the flag"),
    "my_qa_mask": (("0",), "--loss_mask says what is trained; drop the flag"),
    **dict.fromkeys(
        ("LISA", "lisa"),
        (("0",), "a few layers by chance in each step is not here; --peft none trains all, drop the flags"),
    ),
    "moe": (("0",), "there are no experts here; drop the flag"),
    "distillation": (("0",), "--loss distill --reference FILE learns from another model; drop the flag"),
    "zerocot": (("0",), "it is not here; --loss grpo learns from rewards"),
    "head_size_divisor": (("8",), "8 is fixed here, as in all released models; drop the flag"),
    "smoothing": (("0", "0.0"), "the cross entropy is not smoothed here; drop the flag"),
    **dict.fromkeys(
        ("grpo_gen_temperature", "grpo_gen_topp"),
        (
            ("1", "1.0"),
            "answers are drawn at temperature 1 from the whole distribution, the only one whose ln p the"
            " training knows; drop the flag",
        ),
    ),
}

# RWKV-PEFT's 4bit is bitsandbytes' default, fp4
QUANTS = {
    "": ("none", ""),
    "0": ("none", ""),
    "4bit": ("nf4", "nf4 is taken instead of fp4, with as many bits and smaller errors"),
    "fp4": ("nf4", "nf4 is taken instead of fp4, with as many bits and smaller errors"),
    "fp8": ("int8", "int8 is taken instead of fp8, with as many bits"),
}
OPTIMIZERS = {
    **dict.fromkeys(("", "none", "adam"), "adamw"),
    **dict.fromkeys(("adam8bit", "adamw_8bit", "adamw_bnb_8bit"), "adamw8bit"),
}
STRATEGIES = {"single_device": "auto", "single-device": "auto"}

# flags of RWKV-LM and RWKV-PEFT about stages and epochs
STAGE_FLAGS = ("train_stage", "my_pile_stage", "my_exit_tokens", "epoch_save")

NAMES = {
    "train_type",
    "infctx",
    "quant_mode",
    "dataload",
    "optim",
    "rwkv_version",
    "merge",
    *DROPPED,
    *REFUSED,
    *method_flags.NAMES,
    *STAGE_FLAGS,
    *preference_flags.NAMES,
}
USUAL_CHUNK_CTX = 512  # RWKV-PEFT's default
MINI_EPOCH = 40320  # rows in an epoch of RWKV-LM, whatever the data
# old flags that people type for this program too: a command with these alone is no other project's script
SHARED = {
    *method_flags.RANK_FLAGS,
    *preference_flags.NAMES,
    "num_workers",
    "persistent_workers",
    "prefetch_factor",
    "dropout",
    "optim",
    "emb",
}
# flags that only RWKV-LM-RLHF has: there the layer profile chooses the method
OF_RLHF = {"layer_profile", "quant_mode", *preference_flags.SWITCHES, *preference_flags.NUMBERS}


def translate(argv: list[str]) -> tuple[list[str], Notes]:
    """Translate into (the command line in today's flags, notes for the user).

    Raises UserError where a flag cannot be honoured.
    """
    old, kept = _split(argv)
    for name, (harmless, reason) in REFUSED.items():
        if name in old and old[name] not in harmless:
            raise UserError(f"{f'--{name} {old[name]}'.strip()}: {reason}")
    notes = Notes()
    for name in old:
        if name in DROPPED or name in REFUSED:
            part = notes.differences if name in OTHER_RESULT else notes.translations
            part.append(f"--{name} is ignored: {DROPPED.get(name, 'this value changes nothing')}")
    # a YAML file or a preset may give what the command line leaves out
    is_script = bool(old.keys() - SHARED) and not (value(kept, "config") or value(kept, "preset"))
    merges = old.get("merge", "1" if is_script and of_2026(old, kept) else None)
    implied = IMPLIED if is_script and stage(old) != "1" else ()
    last = (_full_training, rate_flags.base_decay) if is_script else ()
    for translated in (*implied, *TRANSLATIONS, *last):
        kept = kept + translated(old, kept, notes)
    _note_merge(merges, value(kept, "peft") == "none", notes)
    notes.explain_there(trainer_of(old))
    return kept, notes


def trainer_of(old: Mapping[str, str]) -> str:
    """Name the trainer whose flags these are."""
    if old.keys() & OF_RLHF:
        return "RWKV-LM-RLHF"
    return "RWKV-LM" if stage(old) != "0" else "RWKV-PEFT or RWKV-LM"


def _split(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split into the old flags with their values ("" for a flag that stands alone), and the other words.

    Options and parts may have been cut up by the shell, as `--peft_config $peft_config` does when the JSON
    has spaces; --sft_field was followed by one word for each column.
    """
    old: dict[str, str] = {}
    kept: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        name, equals, value = token.removeprefix("--").partition("=")
        options = name in ("peft_config", "train_parts", "sft_field") or name in method_flags.CONFIGS
        if not token.startswith("--") or not options and name not in NAMES:
            kept.append(token)
            continue
        words = [value] if equals else []
        while rest and not rest[0].startswith("--") and (options and not equals or not words):
            words.append(rest.pop(0))
        if name in NAMES:
            old[name] = " ".join(words)
        else:
            kept.append(f"--{name}={(',' if name == 'sft_field' else ' ').join(words)}")
    return old, kept


def _note_merge(given: str | None, trains_all: bool, notes: Notes) -> None:
    """Note what --merge, which is 1 in RWKV-PEFT of 2026, leaves here."""
    if given not in ("0", "1", "", None):
        raise UserError(f"--merge {given}: expected 0 or 1; the run leaves an adapter with both")
    if given == "1" and not trains_all:
        notes.differences.append(
            "--merge 1, the default of 2026, leaves a merged rwkv-N.pth there; here the run leaves an"
            " adapter, and python -m rwkv_miss merge makes the model"
        )
    elif given is not None:
        left = "whole model" if trains_all else "adapter"
        notes.translations.append(f"--merge {given} is ignored: the run leaves the {left}, as there")


def _full_training(old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    """Translate a missing method: full training, except in RWKV-LM-RLHF, whose layer profile has it."""
    if any(value(kept, name) is not None for name in ("peft", "peft_config")) or old.keys() & OF_RLHF:
        return []
    model = "" if value(kept, "load_model") else ", of a new model without --load_model"
    notes.translations.append(f"no --peft is full training there{model}: --peft none")
    return ["--peft", "none"]


def _train_type(old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    """Translate RWKV-PEFT's `--train_type infctx` to --chunk_ctx; other types there read no chunk_ctx.

    RWKV-LM-RLHF has --infctx 1 and 0.
    """
    kind, chunk = old.get("train_type"), value(kept, "chunk_ctx")
    said = f"--train_type {kind}"
    if "infctx" in old:
        kind, said = ("infctx" if is_on(old, "infctx") else "none"), f"--infctx {old['infctx']}"
    if kind is None:
        return []
    if kind not in ("none", "infctx", "state", "states", "finetune", "normal", ""):
        raise UserError(f"--train_type {kind}: expected none, infctx or state")
    if kind == "infctx":
        size = chunk or USUAL_CHUNK_CTX
        notes.translations.append(f"{said} is --chunk_ctx {size}: rows run in chunks of {size} tokens")
        return ["--chunk_ctx", str(USUAL_CHUNK_CTX)] if chunk is None else []
    if chunk is None:
        return []
    notes.translations.append(
        f"--chunk_ctx {chunk} is ignored: {said} trains whole rows; infctx has them run in chunks"
    )
    return ["--chunk_ctx", "0"]


def _stage(old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    """Translate RWKV-LM's stages: 1 makes a model, the others go on with the newest one."""
    new: list[str] = []
    name = "train_stage" if "train_stage" in old else "my_pile_stage"
    if stage(old) != "0":
        new += ["--peft", "none", *(["--init_only", "1"] if stage(old) == "1" else ["--resume", "auto"])]
        notes.translations.append(f"--{name} {stage(old)} is {' '.join(new)}")
    if value(kept, "load_model") == "0":
        new += ["--load_model", newest_model(value(kept, "proj_dir") or "out")]
        notes.translations.append(f"--load_model 0 is the newest model there: --load_model {new[-1]}")
    if integer(old, "my_exit_tokens", 0):
        notes.differences.append(
            f"--my_exit_tokens {old['my_exit_tokens']} ends the run there after that many tokens, and the"
            " cosine with it; here both end with one pass over the data: --epoch_count 1"
        )
        new += ["--epoch_count", "1"]
    return new


def _epoch_save(old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    """Turn the epochs between two checkpoints, which both projects count, into --save_steps."""
    epochs = integer(old, "epoch_save", 0)
    if not epochs or value(kept, "save_steps"):
        return []
    steps = integer_of(kept, "epoch_steps", 0)
    if stage(old) != "0":
        steps = MINI_EPOCH // product(kept, "micro_bsz", "devices", "num_nodes", "accumulate_grad_batches")
    if not steps:
        notes.translations.append(
            f"--epoch_save {epochs} is --save_steps -{epochs}: after every pass, or every few"
        )
        return [f"--save_steps=-{epochs}"]
    total = epochs * steps
    notes.translations.append(
        f"--epoch_save {epochs} is --save_steps {total}: {epochs} x {steps} steps of an epoch"
    )
    return ["--save_steps", str(total)]


def _quant(old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    quant = value(kept, "quant")
    if quant == "1":  # RWKV-LM-RLHF, whose mode is in a flag of its own
        quant = old.get("quant_mode", "nf4")
        notes.translations.append(f"--quant 1 is --quant {quant}")
    elif quant not in QUANTS:
        return []
    today, why = QUANTS.get(quant, (quant, ""))
    if why:
        notes.differences.append(f"--quant {quant}: {why}")
    return ["--quant", today]


def _optimizer(old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    """Translate --optim, as --optimizer was called until 2025, and other names of AdamW."""
    given = value(kept, "optimizer")
    if given is None:
        given = old.get("optim")
    today = OPTIMIZERS.get(given, given)
    if today is None or today == value(kept, "optimizer"):
        return []
    if today == given:
        notes.translations.append(f"--optim {given} is --optimizer {given}")
        return ["--optimizer", today]
    notes.translations.append(f"the optimizer {given or 'without a name'} is --optimizer {today}")
    return ["--optimizer", today]


def _kernel(old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    kernel = value(kept, "op")
    if kernel not in ("fla", "triton"):
        return []
    notes.translations.append(f"--op {kernel}: there are own kernels instead; auto chooses")
    return ["--op", "auto"]


def _renamed(old: Mapping[str, str], kept: list[str], notes: Notes) -> list[str]:
    """Translate flags and values that have another name today or a meaning of this project only."""
    new = []
    if "rwkv_version" in old:
        new += ["--my_testing", old["rwkv_version"]]
    if strategy := STRATEGIES.get(value(kept, "strategy")):
        new += ["--strategy", strategy]
    if new:
        notes.translations.append(f"the names today are {' '.join(new)}")
    if value(kept, "random_seed") == "-1":
        notes.translations.append(
            "--random_seed -1 is a seed by chance there; here 42, so that the run can be repeated"
        )
        new += ["--random_seed", "42"]
    return new


# each returns flags of today for its part of the old flags and of the other words
TRANSLATIONS = (
    method_flags.method,
    _train_type,
    _stage,
    _epoch_save,
    data_flags.loss_mask,
    _quant,
    _optimizer,
    _kernel,
    _renamed,
    preference_flags.preference,
)
# each returns flags for what a script of another project leaves out
IMPLIED = (
    method_flags.without_time,
    rate_flags.warm_up,
    rate_flags.schedule,
    data_flags.same_documents,
    data_flags.epoch_steps,
    data_flags.rows,
    data_flags.jsonl,
    data_flags.held_out,
    data_flags.alpaca,
)


def newest_model(folder: str) -> str:
    """Find RWKV-LM's `--load_model 0`: the rwkv-N.pth with the highest N, else rwkv-init.pth."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = [match for name in names if (match := re.fullmatch(r"rwkv-(init|\d+)\.pth", name))]
    numbered = {
        -1 if match[1] == "init" else int(match[1]): os.path.join(folder, match[0]) for match in found
    }
    if not numbered:
        raise UserError(
            f"--load_model 0: {folder} has no rwkv-init.pth and no rwkv-N.pth; make one with --train_stage 1,"
            " or name the model"
        )
    return numbered[max(numbered)]
