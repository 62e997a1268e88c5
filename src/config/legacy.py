"""Command lines of RWKV-LM and RWKV-PEFT, 2024 to 2026, in the flags of `Config`.

Their scripts run as they stand. A flag that means something here under another name is translated; one
without a meaning here is named with the reason; one that would change the result, and that this version
cannot honour, stops the run.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from typing import Any

from rwkv_miss.errors import UserError
from rwkv_miss.files.template_record import EARLIER, HERMES

from . import preference_flags

# any value
DROPPED = {
    "data_type": "the format is read from the file",
    "magic_prime": "the data order needs no prime number",
    "epoch_begin": "--resume auto knows where the run stopped",
    "ds_bucket_mb": "the bucket sizes suit adapters as they are",
    "num_workers": "rows are tokenised once and kept in memory",
    "enable_progress_bar": "the bar shows itself on a terminal",
    "head_size_divisor": "the released value, 8, is fixed",
    "persistent_workers": "there are no loader processes",
    "prefetch_factor": "there are no loader processes",
    "load_partial": "every tensor of a checkpoint must be there",
    "fused_kernel": "the best kernel at hand is chosen, see --wkv",
    "fla": "the best kernel at hand is chosen, see --wkv",
    "kernel": "the best kernel at hand is chosen, see --wkv",
    "head_chunk": "the head runs on the trained tokens only",
    "dataload": "documents share rows unless --packing 0 is set",
    "data_shuffle": "every pass over the data is a new permutation",
    "mask_id": "--loss_mask takes the words that it is about",
}

# values that change nothing, and why any other one stops the run
REFUSED = {
    "merge": (("0", ""), "train.py writes the adapter; merge it with python -m rwkv_miss merge"),
    "pre_ffn": (("0",), "RWKV-6 and RWKV-7 have no such layer; drop the flag"),
    "head_qk": (("0",), "RWKV-6 and RWKV-7 have no such head; drop the flag"),
    "dropout": (("0",), "there is no dropout in the model; that of LoRA is in --peft_config"),
    "weight_decay_final": (("-1",), "the weight decay is constant; drop the flag"),
    "layerwise_lr": (("1",), "the decays always learn at twice the rate, as with 1; drop the flag"),
    "optim": (("none", "", "adam", "adamw"), "the optimizer is AdamW; drop the flag"),
    "optimizer": (("none", "", "adam", "adamw"), "the optimizer is AdamW; drop the flag"),
}

# RWKV-PEFT's masks, and what each of them trains there. With --data_type sft it reads none, and trains the
# answers.
LOSS_MASKS = {
    "none": ("all", "trains every token; padding, which is trained there, is not"),
    "": ("all", "trains every token; padding, which is trained there, is not"),
    "pad": ("all", "trains every token but the padding"),
    "qa": ("Assistant:", "trains what follows Assistant: until the next turn"),
}

# RWKV-PEFT's 4bit is bitsandbytes' default, fp4
QUANTS = {"": "none", "0": "none", "4bit": "nf4", "fp4": "nf4"}

# RWKV-PEFT's options of a method, one flag for each method, as JSON
METHOD_CONFIGS = {
    "miss_config": "miss",
    "disha_config": "miss",
    "bone_config": "miss",
    "lora_config": "lora",
    "pissa_config": "pissa",
}
METHOD_ALIASES = {"bone": "miss", "disha": "miss"}

# before that, one flag for each option of LoRA; the first two stand alone
LORA_FLAGS = ("lora", "PISSA", "lora_r", "lora_alpha", "lora_dropout", "lora_load", "lora_parts", "svd_niter")
# the linears of --lora_parts; what else it names is trained whole
LORA_PARTS = {
    "att": ["att.receptance", "att.key", "att.value", "att.output"],
    "ffn": ["ffn.key", "ffn.value"],
}

# what people type for --peft_config r=N
RANK_FLAGS = ("rank", "r")

# and what RWKV-LM and RWKV-PEFT have about stages and epochs
STAGE_FLAGS = ("train_stage", "my_exit_tokens", "epoch_save")

NAMES = {
    "train_type",
    *DROPPED,
    *REFUSED,
    *METHOD_CONFIGS,
    *LORA_FLAGS,
    *STAGE_FLAGS,
    *RANK_FLAGS,
    *preference_flags.NAMES,
    "emb",
    "state_tune",
}
USUAL_CHUNK_CTX = 512  # that of RWKV-PEFT
MINI_EPOCH = 40320  # rows in an epoch of RWKV-LM, whatever the data


def translate(argv: list[str]) -> tuple[list[str], list[str]]:
    """(the command line in today's flags, notes for the user).

    Raises UserError where a flag cannot be honoured.
    """
    old, kept = _split(argv)
    for name, (harmless, reason) in REFUSED.items():
        if name in old and old[name] not in harmless:
            raise UserError(f"--{name} {old[name]}: {reason}")
    notes = [
        f"--{name} is ignored: {DROPPED.get(name, 'it is off')}"
        for name in old
        if name in DROPPED or name in REFUSED
    ]
    if old and _value(kept, "epoch_steps"):
        notes.append(
            "--epoch_steps counts optimizer steps, as in RWKV-LM and in RWKV-PEFT until 2025; that of 2026"
            " trains on so many documents and drops the rest. Without it all data is used"
        )
    new = [word for translated in TRANSLATIONS for word in translated(old, kept, notes)]
    return kept + new, notes


def _split(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """The old flags with their values ("" for a flag that stands alone), and the other words as they are.

    Options and parts may have been cut up by the shell, as `--peft_config $peft_config` does when the JSON
    has spaces; --sft_field was followed by one word for each column.
    """
    old: dict[str, str] = {}
    kept: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        name, equals, value = token.removeprefix("--").partition("=")
        options = name in ("peft_config", "train_parts", "sft_field") or name in METHOD_CONFIGS
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


def _value(words: list[str], name: str) -> str | None:
    """What a command line gives for a flag, or None; the last one counts, as in argparse."""
    found = None
    for word, after in zip(words, [*words[1:], ""]):
        flag, equals, value = word.partition("=")
        if flag == f"--{name}":
            found = value if equals else after
    return found


def _integer(flags: dict[str, str | None], name: str, default: int) -> int:
    try:
        return int(float(flags.get(name) or default))
    except ValueError:
        raise UserError(f"--{name} {flags[name]}: expected a whole number") from None


def _decimal(flags: dict[str, str], name: str) -> float | None:
    try:
        return float(flags[name]) if name in flags else None
    except ValueError:
        raise UserError(f"--{name} {flags[name]}: expected a number") from None


def _method(old: dict[str, str], kept: list[str], notes: list[str]) -> list[str]:
    """--peft, --peft_config and --train_parts, of every older spelling."""
    named = _value(kept, "peft")
    method = METHOD_ALIASES.get(named, named)
    new: list[str] = []
    options: dict[str, Any] = {}
    beside: list[str] = []  # parts that are trained beside the adapter
    if method != named:
        notes.append(f"--peft {named} is --peft {method}, its name today")
    if "lora" in old or "PISSA" in old:
        method = "pissa" if "PISSA" in old else "lora"
        new += ["--peft", method]
        options, beside = _lora_flags(method, old, notes)
    else:
        notes += [
            f"--{name} is ignored: it belongs to another method than the run's"
            for name in LORA_FLAGS
            if name in old
        ]
    options |= _method_configs(method, old, kept, notes)
    for name in RANK_FLAGS:
        if name in old:
            options["r"] = _integer(old, name, 0)
            notes.append(f"--{name} {old[name]} is --peft_config r={old[name]}")
    if "emb" in old:
        beside.append("emb")
        notes.append("--emb is --train_parts emb")
    if "state_tune" in old or old.get("train_type") == "state":
        # beside a method it is a part, alone it is the method
        if method in (None, "none", "state"):
            new += ["--peft", "state"]
            notes.append("the state alone is trained: --peft state")
        else:
            beside.append("state")
            notes.append("the state is trained beside the adapter: --train_parts state")
    return [*new, *_train_parts(beside, kept), *_peft_config(options, kept, notes)]


def _lora_flags(method: str, old: dict[str, str], notes: list[str]) -> tuple[dict[str, Any], list[str]]:
    """(options, parts beside them) of the flags --lora_*, one for each option."""
    flag = "PISSA" if method == "pissa" else "lora"
    notes.append(f"--{flag} and its flags are --peft {method} with --peft_config")
    options: dict[str, Any] = {
        "r": _integer(old, "lora_r", 8),
        "load": old.get("lora_load"),
        "dropout": _decimal(old, "lora_dropout"),
    }
    if method == "pissa":
        options["niter"] = _integer(old, "svd_niter", 4)
        if "lora_alpha" in old:
            notes.append("--lora_alpha is ignored: PiSSA has the factor 1, there as well")
    else:
        options["alpha"] = _integer(old, "lora_alpha", 32)
    parts = old.get("lora_parts", "att,ln,time").split(",")
    if not set(LORA_PARTS) <= set(parts):
        adapted = [LORA_PARTS[part] for part in LORA_PARTS if part in parts]
        options["targets"] = [*itertools.chain(*adapted)]
    return options, [part for part in parts if part not in LORA_PARTS]


def _method_configs(
    method: str | None, old: dict[str, str], kept: list[str], notes: list[str]
) -> dict[str, Any]:
    """The options in --lora_config and its like, without the method's name before each."""
    options: dict[str, Any] = {}
    for name, of in METHOD_CONFIGS.items():
        if name in old and of != method:
            notes.append(
                f"--{name} is ignored: it is for --peft {of}, and the run has {method or 'the default'}"
            )
        elif name in old:
            try:
                given = json.loads(old[name]).items()
            except (json.JSONDecodeError, AttributeError):
                raise UserError(f'--{name} {old[name]}: expected JSON such as {{"r": 64}}') from None
            options |= {re.sub(r"^(miss|disha|bone|lora|pissa)_", "", key): value for key, value in given}
            notes.append(f"--{name} is --peft_config")
            if _value(kept, "train_parts") is None:
                notes.append(
                    "the tensors whose names contain time or ln stay frozen, where RWKV-PEFT trained them as"
                    " well; --train_parts time,ln does"
                )
    return options


def _train_parts(beside: list[str], kept: list[str]) -> list[str]:
    """--train_parts with the parts that older flags name; "none" was RWKV-PEFT's word for no parts."""
    given = _value(kept, "train_parts") or ""
    if given != "none" and not beside:
        return []
    return ["--train_parts", ",".join([*([] if given in ("", "none") else [given]), *beside])]


def _train_type(old: dict[str, str], kept: list[str], notes: list[str]) -> list[str]:
    """RWKV-PEFT's `--train_type infctx` is --chunk_ctx; with another one that project reads no chunk_ctx."""
    kind, chunk = old.get("train_type"), _value(kept, "chunk_ctx")
    if kind is None:
        return []
    if kind not in ("none", "infctx", "state", ""):
        raise UserError(f"--train_type {kind}: expected none, infctx or state")
    if kind == "infctx":
        size = chunk or USUAL_CHUNK_CTX
        notes.append(f"--train_type infctx is --chunk_ctx {size}: rows run in chunks of so many tokens")
        return ["--chunk_ctx", str(USUAL_CHUNK_CTX)] if chunk is None else []
    if chunk is None:
        return []
    notes.append(
        f"--chunk_ctx {chunk} is ignored: --train_type {kind} trains whole rows; infctx has them run in"
        " chunks"
    )
    return ["--chunk_ctx", "0"]


def _peft_config(options: dict[str, Any], kept: list[str], notes: list[str]) -> list[str]:
    """A method's options in today's names, as --peft_config."""
    if not options:
        return []
    if _value(kept, "peft_config"):
        raise UserError("--peft_config and an older flag for the same options were given; keep the former")
    options = {key: value for key, value in options.items() if value not in (None, "") and key != "init"}
    mode = options.pop("mode", "bone")
    if mode == "bat":
        options["order"] = "row"
    elif mode not in ("bone", "miss", "disha"):
        raise UserError(f"mode {mode}: expected bone, which is --peft miss, or bat")
    if "load" in options:
        path = os.path.join(_value(kept, "proj_dir") or "out", f"{options.pop('load')}.pth")
        if os.path.exists(path):
            raise UserError(
                f"{path} is an adapter of another project, which training cannot go on with. python -m"
                f" rwkv_miss merge takes it, and python -m rwkv_miss convert {path} OUT.pth --to native makes"
                " one for the chat; move it away to train a new one"
            )
        notes.append(f"{path} is not there: a new adapter is trained")
    return [*(["--peft", "bat"] if mode == "bat" else []), "--peft_config", json.dumps(options)]


def _stage(old: dict[str, str], kept: list[str], notes: list[str]) -> list[str]:
    """RWKV-LM's stages: 1 makes a model, the others go on with the newest one."""
    new: list[str] = []
    stage = old.get("train_stage", "0")
    if stage != "0":
        new += ["--peft", "none", *(["--init_only", "1"] if stage == "1" else ["--resume", "auto"])]
        notes.append(f"--train_stage {stage} is {' '.join(new)}")
    if _value(kept, "load_model") == "0":
        new += ["--load_model", newest_model(_value(kept, "proj_dir") or "out")]
        notes.append(f"--load_model 0 is the newest model there: --load_model {new[-1]}")
    if _integer(old, "my_exit_tokens", 0):
        notes.append("--my_exit_tokens is the data once: --epoch_count 1")
        new += ["--epoch_count", "1"]
    return new


def _epoch_save(old: dict[str, str], kept: list[str], notes: list[str]) -> list[str]:
    """Both projects save after so many epochs; --save_steps counts steps."""
    epochs = _integer(old, "epoch_save", 0)
    if not epochs or _value(kept, "save_steps"):
        return []
    steps = _integer({"epoch_steps": _value(kept, "epoch_steps")}, "epoch_steps", 0)
    if old.get("train_stage", "0") != "0":
        names = ("micro_bsz", "devices", "num_nodes", "accumulate_grad_batches")
        given = {name: _value(kept, name) for name in names}
        steps = MINI_EPOCH // math.prod(max(1, _integer(given, name, 1)) for name in names)
    if not steps:
        notes.append("--epoch_save: the run is saved at its end; for more, --save_steps N")
        return []
    total = epochs * steps
    notes.append(f"--epoch_save {epochs} is --save_steps {total}: {epochs} x {steps} steps of an epoch")
    return ["--save_steps", str(total)]


def _warm_up(old: dict[str, str], kept: list[str], notes: list[str]) -> list[str]:
    if not old or _value(kept, "warmup_steps") != "-1":  # among today's flags it is an automatic choice
        return []
    notes.append("--warmup_steps -1 is --warmup_steps 0")
    return ["--warmup_steps", "0"]


def _loss_mask(old: dict[str, str], kept: list[str], notes: list[str]) -> list[str]:
    mask = _value(kept, "loss_mask")
    if mask == "se":
        raise UserError(
            "--loss_mask se marks by token ids; here a mask is told in words: --loss_mask START...END"
        )
    if mask not in LOSS_MASKS:
        return []
    given = f"--loss_mask {mask or repr('')}"
    if old.get("data_type") == "sft":
        notes.append(f"{given} is ignored with --data_type sft, there as well: the answers are trained")
        return ["--loss_mask", "assistant"]
    today, meaning = LOSS_MASKS[mask]
    other = "; assistant trains the answers alone" if today == "all" else ""
    notes.append(f"{given} {meaning}: --loss_mask {today}{other}")
    return ["--loss_mask", today]


def _quant(old: dict[str, str], kept: list[str], notes: list[str]) -> list[str]:
    quant = _value(kept, "quant")
    if quant not in QUANTS:
        return []
    if QUANTS[quant] != "none":
        notes.append(f"--quant {quant}: nf4 is taken instead of fp4, with as many bits and smaller errors")
    return ["--quant", QUANTS[quant]]


def _kernel(old: dict[str, str], kept: list[str], notes: list[str]) -> list[str]:
    kernel = _value(kept, "op")
    if kernel not in ("fla", "triton"):
        return []
    notes.append(f"--op {kernel}: there are own kernels instead; auto chooses")
    return ["--op", "auto"]


# each gives flags of today for what it knows of the old and of the other words
TRANSLATIONS = (
    _method,
    _train_type,
    _stage,
    _epoch_save,
    _warm_up,
    _loss_mask,
    _quant,
    _kernel,
    preference_flags.preference,
)


# settings that a run's config.yaml has, and what people write by hand has not
ONLY_A_RUN_WRITES = {"template", "init_only", "num_nodes", "resume"}


def with_tool_style(values: dict[str, Any]) -> dict[str, Any]:
    """A config.yaml's settings. One that a run wrote before there were tool styles keeps its meaning."""
    if "tool_style" in values or not values.keys() >= ONLY_A_RUN_WRITES:
        return values
    template = values["template"]
    return {**values, "template": EARLIER.get(template, template), "tool_style": HERMES}


def newest_model(folder: str) -> str:
    """RWKV-LM's `--load_model 0`: the rwkv-N.pth with the highest N in the folder, else rwkv-init.pth."""
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
