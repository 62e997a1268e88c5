"""Base model of a run: recognised from its file's header, or new, and built with its adapter."""

from __future__ import annotations

import dataclasses
import os
import sys

import numpy as np
import torch

import rwkv_miss
from rwkv_miss.adapter import check_parts
from rwkv_miss.adapter_file import ADAPTER_FORMAT, adapter_tensors, read_described
from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.files.hub_names import hint
from rwkv_miss.merging.rounding import percent
from rwkv_miss.methods.token_rows import tokens_text
from rwkv_miss.methods.whole_tensors import split_parts

from ..common.formatting import counted
from ..config import Config
from ..config.schema import CHOSEN
from ..config.validate import check_sizes
from ..data.chat_template import Template
from ..data.examples import Examples
from ..data.recorded_tokenizer import recorded_tokenizer
from ..data.rwkv_template import RwkvTemplate
from ..data.templates import recorded_template
from ..data.tokenizer import WORLD_MODEL, Tokenizer, load_tokenizer
from ..model import RWKV, default_arch, read_model_file
from ..model.dtypes import dtype_of, dtype_of_base
from . import start_adapter
from .defaults import first_rate, first_rate_of_all, own_rank
from .draft import Draft

BEGINS_WITHIN = 1.01e-4  # RWKV-LM's first embeddings are within 1e-4, and a dtype of few bits rounds that up
MAY_BE_UNTRAINED = 0.01  # share of the data's tokens
LOOKED_AT = 10_000  # documents, for their tokens
NAMED = 4  # tokens
MOST_ROWS = 500  # rows of tokens; for each a server keeps as many numbers as the vocabulary has tokens


def read_base(draft: Draft):
    """Read (Arch, tokenizer) from the checkpoint's header, or from the size flags of a new model.

    No weight is read yet. Names, shapes, adapter options and targets are checked on a model without memory.
    """
    config = draft.config
    if not config.load_model:
        arch, tokenizer = new_arch(config)
        if config.reference:
            check_reference(config.reference, "the new model", arch.vocab_size)
        return arch, tokenizer
    tensors = read_model_file(config.load_model)
    arch = Arch.detect(tensors)
    check_sizes(config, arch)
    with torch.device("meta"):
        model = RWKV(arch)
    model.check(tensors, config.load_model)
    if config.init_adapter:
        start_adapter.take_settings(draft, arch)
    if draft.config.adapter:
        config = draft.config
        rank, reason = own_rank(config.peft, min(arch.n_embd, arch.dim_att))
        draft.choose("peft_config", rank, reason)
        # --peft_config may give options other than the rank
        if not draft.config.adapter.gives_rank:
            draft.put(peft_config={**rank, **draft.config.peft_config})
        draft.config.adapter.inject(model)
    trained = [name for name, tensor in adapter_tensors(model).items() if tensor.requires_grad]
    check_parts("--lr_map", config.settled().lr_map, trained)
    if config.reference:
        check_reference(config.reference, config.load_model, arch.vocab_size)
    return arch, recorded_tokenizer(config.tokenizer, config.eod, arch.vocab_size, config.load_model)


def choose_train_parts(draft: Draft, arch: Arch, documents: Examples, tokenizer: Tokenizer) -> None:
    """Fill in train_parts, train_tokens and lr_map: rows of embedding and head for tokens the base never saw.

    An embedding row begins within BEGINS_WITHIN of 0, and moves as soon as its token is trained. So an
    untrained token is known exactly. In a base that is new no row tells anything.
    """
    config = draft.config
    if not config.is_automatic("train_parts"):
        if config.init_adapter and config.origin_of("train_parts").startswith(CHOSEN):
            choose_factors(draft, arch, config.train_parts)
        return
    has_kl = config.on_rewards and config.settled().beta and not config.reference
    if config.peft in ("none", "state") or has_kl:
        draft.choose("train_parts", "", "a KL needs the base" if has_kl else f"--peft {config.peft} is given")
        return
    rows = read_model_file(config.load_model)["emb.weight"]
    chosen = documents.take(np.arange(0, len(documents), len(documents) // LOOKED_AT + 1))
    ids, counts = np.unique(np.concatenate([np.zeros(0, np.int32), *chosen.inputs()]), return_counts=True)
    unseen = is_untrained(rows[torch.from_numpy(ids)]).numpy()
    share = counts[unseen].sum() / max(counts.sum(), 1)
    if share <= MAY_BE_UNTRAINED or unseen.all() and is_untrained(rows).all():
        draft.choose("train_parts", "", "the base has seen the data's tokens, or none at all")
        return
    most = ids[unseen][np.argsort(-counts[unseen], kind="stable")]
    named = ", ".join(token_text(tokenizer, token) for token in most[:NAMED].tolist())
    parts = [part for part in ("emb", "head") if part not in (config.adapter.targets or ())]
    reason = (
        f"the base never saw {percent(share)} of the data's tokens: {counted(len(most), 'token')} such as"
        f" {named}"
    )
    if "emb" in parts and config.adapted_layers(arch.n_layer)[0]:
        parts.remove("emb")
        reason += "; emb lies below --layers"
    draft.choose("train_parts", ",".join(parts), reason)
    if parts and len(most) <= MOST_ROWS:
        draft.change("train_tokens", tokens_text(sorted(most.tolist())), "the tokens that the base never saw")
    choose_factors(draft, arch, ",".join(parts))


def choose_factors(draft: Draft, arch: Arch, train_parts: str) -> None:
    """Fill in lr_map for embedding and head, which nobody asked to train."""
    factor = first_rate_of_all(arch) / 2 / first_rate(draft.config, arch)
    parts = [part for part in split_parts(train_parts) if part in ("emb", "head")]
    factors = dict.fromkeys(parts, float(f"{min(factor, 1.0):.1g}"))
    draft.choose("lr_map", factors, "rows and whole tensors move half as far in a step as in full training")


def is_untrained(rows: torch.Tensor) -> torch.Tensor:
    """Tell which embedding rows (n, C) are as they began, (n,) bool."""
    return rows.abs().amax(1).float() <= BEGINS_WITHIN


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Write a token as its text, or as its number where it is a part of a character."""
    text = tokenizer.decode([token]) if token in tokenizer.ids else ""
    return repr(text) if text.isprintable() and text.strip("\ufffd ") else str(token)


def check_reference(reference: str, load_model: str, vocab_size: int) -> None:
    """Raise UserError unless --reference is a whole model, of any size, with the base's vocabulary."""
    if not os.path.exists(reference):
        raise UserError(f"--reference {reference} does not exist{hint(reference)}")
    try:
        _, metadata = read_described(reference, shown=False)
        is_adapter = metadata.get("format") == ADAPTER_FORMAT
        tensors = {} if is_adapter else read_model_file(reference)
    except UserError as error:
        raise UserError(f"--reference: {error}") from None
    if is_adapter:
        base = metadata.get("base") or "BASE"
        raise UserError(
            f"--reference {reference} is an adapter; merge it into its base first (python -m rwkv_miss"
            f" merge --base {base} --adapter {reference} --out merged.pth), and give the merged file"
        )
    other = Arch.detect(tensors)
    if other.vocab_size != vocab_size:
        raise UserError(
            f"--reference {reference} has a vocabulary of {other.vocab_size} tokens,"
            f" {load_model} one of {vocab_size}; give a model with the same vocabulary"
        )
    with torch.device("meta"):
        RWKV(other).check(tensors, reference)


def template_of_run(draft: Draft, tokenizer: Tokenizer | None) -> Template:
    """Load the template of conversations; fills in the tool style. Raises UserError for a wrong template."""
    config = draft.config
    template = recorded_template(config.template, tokenizer, config.load_model, tool_style=config.tool_style)
    if isinstance(template, RwkvTemplate):
        reason = "the form of tools and their calls, as the model records it or by its vocabulary"
        draft.choose("tool_style", template.tools.name, reason)
    return template


def new_arch(config: Config):
    """Choose (Arch, tokenizer) of a new model.

    It has RWKV-LM's sizes for --n_layer and --n_embd, and the tokenizer's vocabulary. The tokenizer is None
    for a model that is written and not trained, with another vocabulary than World's.
    """
    vocab = config.vocab_size
    if config.tokenizer in ("auto", "world"):
        vocab = vocab or WORLD_MODEL
    tokenizer = None
    if not config.init_only or config.tokenizer != "auto" or vocab == WORLD_MODEL:
        tokenizer = load_tokenizer(config.tokenizer, vocab or sys.maxsize, config.eod)
    head_size = config.head_size or 64
    inner = config.dim_att or config.n_embd
    if inner % head_size:
        raise UserError(f"the width of the time mix, {inner}, is not a multiple of --head_size {head_size}")
    if config.version == "x070" and inner != config.n_embd:
        raise UserError(f"--dim_att {inner} differs from --n_embd {config.n_embd}; RWKV-7 has them equal")
    version = int(config.version[2])
    arch = default_arch(version, config.n_layer, config.n_embd, vocab or tokenizer.vocab_size, head_size)
    ffn = config.dim_ffn or arch.dim_ffn
    return dataclasses.replace(arch, n_head=inner // head_size, dim_att=inner, dim_ffn=ffn), tokenizer


def build_model(
    config: Config, arch: Arch, kernel: str, dtype: torch.dtype, resume_from: str | None = None
) -> RWKV:
    """Build the model with its adapter, before the first step or as in the checkpoint `resume_from`."""
    if config.load_model:
        base_dtype = dtype_of_base(config.peft, config.quant, dtype)
        # dtypes as in the file: ZeRO-3 converts each tensor when it shards it
        if config.strategy.startswith("deepspeed_stage_3"):
            base_dtype = None
        model = RWKV.load(config.load_model, base_dtype, kernel=kernel)
    else:
        model = RWKV(arch, kernel)
    model.grad_cp = config.grad_cp
    model.computes_in = dtype_of(config.peft, config.precision)
    if config.init_adapter:
        start_adapter.put(model, config)
    elif config.adapter:
        config.adapter.inject(model, rwkv_miss.read_checkpoint(resume_from) if resume_from else None)
    if config.quant != "none":
        model.quantise(config.quant, dtype)
    return model
