"""Whether settings make sense, alone and together: one place for all rules, asked before anything is
loaded.
"""

from __future__ import annotations

import math
from typing import Any

from rwkv_miss.adapter import METHODS
from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.methods.whole_tensors import split_parts

from .schema import FIELDS, TARGET_NAMES, Config, accumulation, is_automatic, type_of


def adapter_options(config: Config) -> tuple[dict[str, Any], list[str] | None]:
    """(options for inject(), targets or None) out of peft_config."""
    options = dict(config.peft_config)
    targets = None
    for name in TARGET_NAMES:
        targets = options.pop(name, targets)
    if targets is not None and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise UserError(
            f'--peft_config targets must be a list of names, such as ["key", "value"]; got {targets!r}'
        )
    return options, targets


def validate(config: Config) -> None:
    """Rules that concern values and pairs of values; what depends on the checkpoint or the data is checked
    where they are read.
    """
    for part, factor in config.lr_map.items():
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
            raise UserError(
                f"--lr_map {part}: must be a factor of the learning rate, 0 or more; got {factor!r}"
            )
    for name in ("epoch_count", "devices", "num_nodes", "save_total_limit"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: must be at least 1")
    for name in (
        "n_layer",
        "n_embd",
        "vocab_size",
        "dim_att",
        "dim_ffn",
        "head_size",
        "epoch_steps",
        "global_bsz",
        "warmup_steps",
        "save_steps",
        "rollback_steps",
        "ctx_len",
        "micro_bsz",
        "accumulate_grad_batches",
        "chunk_ctx",
        "truncate_ctx",
        "spike_sigmas",
        "lr_init",
        "state_lr",
        "weight_decay",
        "grad_clip",
        "random_seed",
        "adam_eps",
        "eval_docs",
        "eval_steps",
        "eval_samples",
        "early_stop",
    ):
        if getattr(config, name) < 0:
            raise UserError(f"--{name} {getattr(config, name)}: must not be negative")
    for name in FIELDS:
        if type_of(name) is int and name != "random_seed" and getattr(config, name) >= 2**31:
            raise UserError(f"--{name} {getattr(config, name)}: must be below 2^31")
    for name in ("lr_init", "lr_final", "state_lr", "weight_decay", "adam_eps"):
        if getattr(config, name) > 1e30:
            raise UserError(f"--{name} {getattr(config, name):g}: must not be above 1e30")
    decays = config.train_parts or config.peft not in METHODS or METHODS[config.peft].decays
    if config.weight_decay and not decays:
        raise UserError(
            f"--weight_decay {config.weight_decay} has no meaning with --peft {config.peft}: its matrices at "
            "zero are not the base, so they do not decay; drop the flag"
        )
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: must be at least 0 and below 1")
    check_data(config)
    if not config.proj_dir:
        raise UserError("--proj_dir is empty: give the folder that the run writes into")
    if not config.load_model and config.peft != "none":
        raise UserError(
            f"--peft {config.peft} needs a base: give --load_model, or train a new model with --peft none"
        )
    if not config.load_model and not (config.n_layer and config.n_embd and config.version):
        raise UserError("a new model needs --version, --n_layer and --n_embd (or give --load_model)")
    if config.init_only and config.load_model:
        raise UserError(
            f"--init_only makes a new model, but --load_model {config.load_model} was given; drop one of them"
        )
    if config.lr_schedule == "constant" and config.lr_final >= 0:
        raise UserError(f"--lr_final {config.lr_final} has no meaning with --lr_schedule constant")
    if not (0 <= config.eval_split < 1 or is_automatic(config, "eval_split")):
        raise UserError(f"--eval_split {config.eval_split}: must be a share below 1, such as 0.05")
    if config.grad_cp not in (-1, 0, 1, 2):
        raise UserError(f"--grad_cp {config.grad_cp}: expected 0, 1 or 2, or -1 for an automatic choice")
    if config.eval_file and config.eval_split > 0:
        raise UserError(
            f"--eval_file {config.eval_file} and --eval_split {config.eval_split} were given; drop one of"
            " them"
        )
    for name in ("eval_steps", "eval_docs"):
        if getattr(config, name) and not (config.eval_file or config.eval_split):
            raise UserError(
                f"--{name} {getattr(config, name)} needs held-out data; give --eval_file, "
                "or --eval_split 0.05"
            )
    if config.early_stop and not config.eval_steps:
        raise UserError(f"--early_stop {config.early_stop} counts evaluations; give --eval_steps, too")
    if config.random_seed >= 2**63:
        raise UserError(f"--random_seed {config.random_seed}: must be below 2^63")
    if config.peft == "none" and config.peft_config:
        raise UserError(f"--peft_config {config.peft_config} has no meaning with --peft none")
    if split_parts(config.train_parts) and config.peft == "none":
        raise UserError(
            f"--train_parts {config.train_parts} has no meaning with --peft none, which trains everything;"
            " choose an adapter, or drop it"
        )
    if config.state_lr and "state" not in split_parts(config.train_parts):
        raise UserError(
            f"--state_lr {config.state_lr} is for --train_parts state, the initial state beside an adapter;"
            " alone it learns at --lr_init"
        )
    given = "micro_bsz" if config.micro_bsz else "accumulate_grad_batches"
    each = max(getattr(config, given), 1) * config.world
    if config.global_bsz % each:
        raise UserError(
            f"--global_bsz {config.global_bsz} is not a multiple of {given} x devices x num_nodes = {each}"
        )
    if config.micro_bsz and config.accumulate_grad_batches not in (0, accumulation(config)):
        raise UserError(
            f"--global_bsz {config.global_bsz} makes accumulate_grad_batches {accumulation(config)}, "
            f"but {config.accumulate_grad_batches} was given; drop one of them"
        )
    if not config.chunk_ctx and (config.truncate_ctx or config.state_cp):
        raise UserError(
            f"--{'truncate_ctx' if config.truncate_ctx else 'state_cp'} works with --chunk_ctx N: rows that"
            " are run whole have no chunks"
        )
    if config.chunk_ctx and config.truncate_ctx % config.chunk_ctx:
        raise UserError(
            f"--truncate_ctx {config.truncate_ctx}: the gradient stops between chunks, at multiples of"
            f" --chunk_ctx {config.chunk_ctx}"
        )
    if config.chunk_ctx >= config.ctx_len > 0:
        raise UserError(
            f"--chunk_ctx {config.chunk_ctx} is not below --ctx_len {config.ctx_len}, the longest row: there"
            " would be nothing to cut; raise --ctx_len to the length that your documents need, or drop"
            " --chunk_ctx"
        )
    if config.precision == "fp16" and config.strategy.startswith("deepspeed"):
        raise UserError(
            "--precision fp16 works with --strategy auto or ddp: DeepSpeed's fp16 mode would turn the adapter"
            " into fp16 too"
        )
    if config.quant != "none" and config.peft == "none":
        raise UserError(
            f"--quant {config.quant} is for a frozen base; --peft none trains all of it: choose an adapter,"
            " or drop --quant"
        )
    if config.quant != "none" and config.strategy.startswith("deepspeed_stage_3"):
        raise UserError(
            f"--quant {config.quant} works with --strategy auto, ddp, deepspeed_stage_1 and _2: stage 3"
            " shares out tensors of floating-point numbers, and a quantised base is whole in every process"
        )
    if config.num_nodes > 1 and config.strategy == "auto":
        raise UserError("--num_nodes needs --strategy deepspeed_stage_1, _2, _3 or ddp")


def check_data(config: Config) -> None:
    """The rules about the data alone."""
    if config.ctx_len < 0:
        raise UserError(f"--ctx_len {config.ctx_len}: must not be negative")
    if not config.data_file:
        raise UserError("--data_file is missing: the data to train on")
    if not config.loss_mask.partition("...")[0]:
        raise UserError(
            f"--loss_mask {config.loss_mask!r}: expected assistant, all, or a marker such as Assistant: or"
            " START...END"
        )


def check_sizes(config: Config, arch: Arch) -> None:
    """A size given by hand is an assertion about the checkpoint; a contradiction is a UserError that shows
    both.
    """
    in_file = {
        "version": f"x0{arch.version}0",
        "n_layer": arch.n_layer,
        "n_embd": arch.n_embd,
        "vocab_size": arch.vocab_size,
        "dim_att": arch.dim_att,
        "dim_ffn": arch.dim_ffn,
        "head_size": arch.head_size,
    }
    for name, value in in_file.items():
        given = getattr(config, name)
        if given and given != value:
            raise UserError(
                f"{config.load_model} has {name} {value}, but --{name} {given} was given; drop the flag"
            )
