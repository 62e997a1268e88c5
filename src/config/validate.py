"""Validation of the settings, alone and together: all rules, checked before anything is loaded.

A rule is a function that raises UserError. Rules about the checkpoint or the data are checked where they are
read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from rwkv_miss.adapter import METHODS
from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.flags import Bounds
from rwkv_miss.methods.token_rows import LAYERS, token_ids
from rwkv_miss.methods.whole_tensors import split_parts

from ..common.option import AUTO
from ..losses import LOSSES
from .loss_rules import check_loss
from .reward_rules import check_rewards
from .schema import FIELDS, Config, type_of

BOS_WORDS = ("recorded", "none", "auto")
WHOLE_NUMBERS = Bounds(below=2**31)  # for a setting without bounds of its own


def validate(config: Config) -> None:
    """Check all rules."""
    for rule in RULES:
        rule(config)


def check_bounds(config: Config, names: Iterable[str] = FIELDS) -> None:
    """Check that a number is within the bounds that its setting has in schema.py."""
    for name in names:
        bounds, value = FIELDS[name].metadata["bounds"], config.written(name)
        if type_of(name) not in (int, float):
            continue
        complaint = bounds.complaint(value)
        if type_of(name) is int and bounds.below is None:
            complaint = complaint or WHOLE_NUMBERS.complaint(value)
        if complaint:
            raise UserError(f"--{name} {value}: {complaint}")


def check_data(config: Config) -> None:
    """Check the rules about the data alone."""
    check_bounds(config, ["ctx_len", "think_weight", "prompt_weight"])
    if not config.data_file:
        raise UserError("--data_file is missing; give the data to train on")
    check_bos(config.bos)
    if not config.loss_mask.partition("...")[0]:
        raise UserError(
            f"--loss_mask {config.loss_mask!r}: expected assistant, all, or a marker such as Assistant: or"
            " START...END"
        )
    if config.prompt_weight and config.loss_mask == "all":
        raise UserError(
            f"--prompt_weight {config.prompt_weight:g} has no meaning with --loss_mask all, which trains"
            " prompts too; drop one of them"
        )


def check_bos(bos: str) -> None:
    """Check that --bos is a word or a number. The vocabulary is checked when it is read."""
    if bos not in BOS_WORDS and not re.fullmatch(r"[0-9]{1,9}", bos):
        raise UserError(f"--bos {bos}: expected {', '.join(BOS_WORDS)}, or the id of a token, such as 0")


def check_base(config: Config) -> None:
    """Check that there is a folder to write, and a base or the sizes of a new model."""
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


def check_adapter(config: Config) -> None:
    """Check that the options can be parsed; full training has none."""
    if config.adapter:
        return
    if config.settled().peft_config:
        raise UserError(f"--peft_config {config.peft_config} has no meaning with --peft none")
    if config.init_adapter:
        raise UserError(
            f"--init_adapter {config.init_adapter} has no meaning with --peft none; merge it first (python -m"
            f" rwkv_miss merge --base {config.load_model} --adapter {config.init_adapter} --out merged.pth),"
            " and give --load_model merged.pth"
        )
    if config.layers:
        raise UserError(
            f"--layers {config.layers} has no meaning with --peft none, which trains everything; choose an"
            " adapter, or drop it"
        )
    if split_parts(config.settled().train_parts):
        raise UserError(
            f"--train_parts {config.train_parts} has no meaning with --peft none, which trains everything;"
            " choose an adapter, or drop it"
        )


def check_tokens(config: Config) -> None:
    """Check that tokens are ids, and have a part whose rows are trained."""
    parts = split_parts(config.settled().train_parts)
    if token_ids(config.train_tokens) and not {*LAYERS} & {*parts}:
        raise UserError(
            f"--train_tokens {config.train_tokens} is for rows of emb and head; give"
            " --train_parts emb,head too"
        )


def check_start(config: Config) -> None:
    """Refuse --init_adapter with a loss whose reference would be the base without that adapter."""
    loss, has_kl = LOSSES[config.loss], config.on_rewards and config.settled().beta
    compares = has_kl or loss.needs_reference and not loss.needs_teacher
    if config.init_adapter and compares and not config.reference:
        raise UserError(
            f"--loss {config.loss} compares with a reference, and --init_adapter {config.init_adapter} leaves"
            f" open which one. Merge it (python -m rwkv_miss merge --base {config.load_model} --adapter"
            f" {config.init_adapter} --out merged.pth), and give --reference merged.pth with it, or"
            " --load_model merged.pth without it"
        )


def check_learning_rates(config: Config) -> None:
    """Check that every given rate is used."""
    for part, factor in config.settled().lr_map.items():
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
            raise UserError(
                f"--lr_map {part}: must be a factor of the learning rate, 0 or more; got {factor!r}"
            )
    if config.lr_schedule == "constant" and config.lr_final >= 0:
        raise UserError(f"--lr_final {config.lr_final} has no meaning with --lr_schedule constant")
    if config.lr_schedule == "exp" and config.lr_final == 0:
        raise UserError(
            "--lr_final 0 is never reached by --lr_schedule exp, which multiplies; give a rate above 0, or"
            " --lr_schedule linear"
        )
    if config.state_lr and "state" not in split_parts(config.settled().train_parts):
        raise UserError(
            f"--state_lr {config.state_lr} is for --train_parts state, an initial state with an adapter;"
            " alone it learns at --lr_init"
        )


def check_weight_decay(config: Config) -> None:
    """Check that something that is trained decays."""
    decays = config.settled().train_parts or config.peft not in METHODS or METHODS[config.peft].decays
    if config.weight_decay and not decays:
        raise UserError(
            f"--weight_decay {config.weight_decay} has no meaning with --peft {config.peft}: its matrices at "
            "zero are not the base, so they do not decay; drop the flag"
        )


def check_evaluation(config: Config) -> None:
    """Check that evaluations have held-out data, from one place."""
    given = config.settled()
    if not 0 <= given.eval_split < 1:
        raise UserError(f"--eval_split {config.eval_split}: must be a share below 1, such as 0.05")
    if config.eval_file and given.eval_split:
        raise UserError(
            f"--eval_file {config.eval_file} and --eval_split {config.eval_split} were given; drop one of"
            " them"
        )
    for name in ("eval_steps", "eval_docs"):
        if getattr(given, name) and not config.eval_file and config.eval_split == 0:
            raise UserError(
                f"--{name} {getattr(config, name)} needs held-out data; give --eval_file, "
                "or --eval_split 0.05"
            )
    # with nothing held out the training loss may end a run, but not the reward of drawn answers
    by_heart = not config.eval_file and config.eval_split == 0 and not config.on_rewards
    if given.early_stop and not given.eval_steps and not by_heart:
        raise UserError(f"--early_stop {config.early_stop} counts evaluations; give --eval_steps, too")


def check_rows_per_step(config: Config) -> None:
    """Check that the rows of a step are whole forward passes of all devices."""
    given = config.settled()
    rows, passes = given.micro_bsz, given.accumulate_grad_batches
    name = "micro_bsz" if rows else "accumulate_grad_batches"
    each = (rows or passes or 1) * config.world
    if config.global_bsz % each:
        raise UserError(
            f"--global_bsz {config.global_bsz} is not a multiple of {name} x devices x num_nodes = {each}"
        )
    if rows and passes not in (0, config.accumulation):
        raise UserError(
            f"--global_bsz {config.global_bsz} makes accumulate_grad_batches {config.accumulation}, "
            f"but {passes} was given; drop one of them"
        )


def check_chunks(config: Config) -> None:
    """Check that rows that run in chunks are longer than a chunk."""
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
    if config.chunk_ctx >= config.settled().ctx_len > 0:
        raise UserError(
            f"--chunk_ctx {config.chunk_ctx} is not below --ctx_len {config.ctx_len}, the longest row: there"
            " would be nothing to cut; raise --ctx_len to the length that your documents need, or drop"
            " --chunk_ctx"
        )


def check_memory(config: Config) -> None:
    """Check that memory savers fit what is trained."""
    if config.grad_cp not in (AUTO, 0, 1, 2):
        raise UserError(f"--grad_cp {config.grad_cp}: expected 0, 1 or 2, or -1 for an automatic choice")
    if config.quant != "none" and config.peft == "none":
        raise UserError(
            f"--quant {config.quant} is for a frozen base; --peft none trains all of it: choose an adapter,"
            " or drop --quant"
        )


def check_strategy(config: Config) -> None:
    """Check that the strategy supports the precision, the quantisation and several machines."""
    if config.precision == "fp16" and config.strategy.startswith("deepspeed"):
        raise UserError(
            "--precision fp16 works with --strategy auto or ddp: DeepSpeed's fp16 mode would turn the adapter"
            " into fp16 too"
        )
    if config.quant != "none" and config.strategy.startswith("deepspeed_stage_3"):
        raise UserError(
            f"--quant {config.quant} works with --strategy auto, ddp, deepspeed_stage_1 and _2: stage 3"
            " shares out tensors of floating-point numbers, and a quantised base is whole in every process"
        )
    if config.num_nodes > 1 and config.strategy == "auto":
        raise UserError("--num_nodes needs --strategy deepspeed_stage_1, _2, _3 or ddp")


RULES = (
    check_bounds,
    check_data,
    check_base,
    check_adapter,
    check_tokens,
    check_start,
    check_loss,
    check_rewards,
    check_learning_rates,
    check_weight_decay,
    check_evaluation,
    check_rows_per_step,
    check_chunks,
    check_memory,
    check_strategy,
)


def check_sizes(config: Config, arch: Arch) -> None:
    """Check that a size given by hand is the checkpoint's. Raises UserError that shows both."""
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
