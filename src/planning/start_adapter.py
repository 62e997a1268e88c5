"""Adapter that a run begins with, --init_adapter: it decides the method and its options, and has to fit."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

import torch
from torch import Tensor

import rwkv_miss
from rwkv_miss.adapter import METHODS
from rwkv_miss.adapter_file import adapter_tensors, checked_metadata
from rwkv_miss.convert import read_any
from rwkv_miss.convert.formats import Adapter, Hints
from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.files.hub_names import hint
from rwkv_miss.files.identity import Identity, fingerprint
from rwkv_miss.fit import refuse_other_base
from rwkv_miss.methods.token_rows import layers_of_rows, token_ids, tokens_text
from rwkv_miss.methods.whole_tensors import PARTS, split_parts
from rwkv_miss.save_and_load import fit_adapter
from rwkv_miss.target_checks import find_targets
from rwkv_miss.targets import layer_number, layer_numbers, layers_text

from ..common.first_process import is_first_process
from ..config import Config
from ..config.adapter_options import TARGET_NAMES
from ..config.schema import PUBLISHED
from ..model import RWKV
from .draft import Draft


def take_settings(draft: Draft, arch: Arch) -> None:
    """Fill in --peft, --peft_config, --train_parts and --layers from the file of --init_adapter.

    Raises UserError for a file that does not fit the base, and for a given setting that is another one.
    """
    config, adapter = draft.config, _read(draft.config)
    refuse_other_base(
        f"--init_adapter {config.init_adapter}",
        adapter.metadata,
        config.load_model,
        arch,
        lambda: Identity(config.load_model, shown=is_first_process()).fingerprint,
        _merge_first(config, adapter.metadata["base"]),
    )
    found = _settings(adapter, arch)
    for name, value in found.items():
        given = getattr(config, name)
        if config.is_automatic(name) or given == Config().written(name) and name not in config.origins:
            draft.change(name, value, f"in --init_adapter {config.init_adapter}")
        elif other := _difference(config, name, given, adapter, value, arch):
            _refuse(config, other)
    given = config.settled().peft_config
    targets = {name: given[name] for name in TARGET_NAMES if name in given}
    draft.put(peft_config={**found["peft_config"], **targets})
    if PUBLISHED in draft.config.origin_of("lr_init"):
        draft.put(lr_init=draft.config.published_rate)
    _check_tensors(draft.config, adapter, arch)


def put(model: RWKV, config: Config) -> None:
    """Adapt the model as the file of --init_adapter is, with its values."""
    path, adapter = config.init_adapter, _read(config)
    rwkv_miss.load_adapter(model, path, keep_first=False, content=_content(config, adapter))
    model.start_fingerprint = fingerprint(adapter.tensors)


def _read(config: Config) -> Adapter:
    """Read the file or folder, of any project.

    LoRA's alpha, which some files lack, may be a setting. RWKV-PEFT keeps what PiSSA began with in
    init_pissa.pth in the adapter's folder.
    """
    path = config.init_adapter
    if not os.path.exists(path):
        way = hint(path) or "; give an adapter's file, such as the adapter.pth of a run's folder"
        raise UserError(f"--init_adapter {path} does not exist{way}")
    options = config.settled().peft_config
    hints = Hints(alpha=options.get("alpha", options.get("lora_alpha")))
    first = os.path.join(os.path.dirname(path), "init_pissa.pth")
    if config.peft == "pissa" and os.path.exists(first):
        hints = Hints(init=first)
    try:
        adapter = read_any(path, hints)[1]
    except UserError as error:
        try:
            adapter = read_any(path)[1]  # a format that leaves nothing open
        except UserError:
            raise UserError(f"--init_adapter: {_with_flags_of_training(path, str(error))}") from None
    # peft names modules that were saved as a whole, and no parts
    whole = [part for part in PARTS if part != adapter.method and _has_part(adapter, part)]
    return dataclasses.replace(adapter, metadata={**adapter.metadata, "train_parts": whole})


def _with_flags_of_training(path: str, error: str) -> str:
    """Return an error of reading with what helps here, where it asks for a flag of convert."""
    asked = set(re.findall(r"--(alpha|base|init|origin|profile)\b", error))
    if asked == {"alpha", "init"}:
        return (
            f"{path} does not hold LoRA's alpha: give that of its training, such as --peft_config alpha=16. A"
            " PiSSA file looks the same: then give --peft pissa, with the init_pissa.pth of its training"
            " in the same folder"
        )
    convert = f". Say it to python -m rwkv_miss convert {path} OUT.pth --to native, and give OUT.pth"
    return error + convert if asked else error


def _has_part(adapter: Adapter, part: str) -> bool:
    return f"{part}.token_rows" in adapter.tensors or any(
        re.fullmatch(PARTS[part], name) for name in adapter.tensors
    )


def _settings(adapter: Adapter, arch: Arch) -> dict[str, Any]:
    """Return the settings with which a run on this base has such an adapter."""
    metadata = adapter.metadata
    rows = layers_of_rows(metadata["tokens"], metadata["train_parts"])
    linears = [name for name in metadata["linears"] if name not in rows]
    usual = vars(METHODS[adapter.method].Options())
    options = vars(adapter.options).items()
    config = {name: value for name, value in options if name == "rank" or value != usual[name]}
    numbers = metadata["layers"] or {layer_number(name) for name in linears} - {None}
    layers = layers_text(numbers) if len(numbers) not in (0, arch.n_layer) else ""
    if linears:
        with torch.device("meta"):
            model = RWKV(arch)
        if find_targets(model, None, layers=layers or None).keys() != set(linears):
            config["targets"] = sorted({name.split(".", 2)[-1] for name in linears})
    parts = ",".join(metadata["train_parts"])
    found = {"peft": adapter.method, "peft_config": config, "train_parts": parts, "layers": layers}
    return found | ({"train_tokens": tokens_text(metadata["tokens"])} if metadata["tokens"] else {})


def _difference(config: Config, name: str, given: Any, adapter: Adapter, value: Any, arch: Arch) -> str:
    """Describe how a given setting differs from the file's; "" if it does not."""
    if name == "peft_config":
        cls = METHODS[adapter.method].Options
        options = {key: option for key, option in given.items() if key not in TARGET_NAMES}
        wanted, there = vars(cls.parse(options)), vars(adapter.options)
        names = [cls.aliases.get(key, key) for key in options]
        return next(
            (f"has {n} {there[n]}, and {wanted[n]} was given" for n in names if wanted[n] != there[n]), ""
        )
    same = given == value
    if name == "train_parts":
        same = split_parts(given) == split_parts(value)
    if name == "train_tokens":
        same = token_ids(given) == token_ids(value)
    if name == "layers":
        every = range(arch.n_layer)
        same = config.adapted_layers(arch.n_layer) == sorted(layer_numbers(value, every) if value else every)
    return "" if same else f"has --{name} {value or 'empty'}, and {given} was given"


def _check_tensors(config: Config, adapter: Adapter, arch: Arch) -> None:
    """Raise UserError unless a run with these settings trains exactly the file's tensors."""
    with torch.device("meta"):
        model = RWKV(arch)
    config.adapter.inject(model)
    try:
        fit_adapter(model, config.init_adapter, content=_content(config, adapter))
    except UserError as error:
        raise UserError(f"--init_adapter: {error}; {_merge_first(config)}") from None
    for name in adapter.tensors.keys() - adapter_tensors(model).keys():
        _refuse(config, f"has {name}, and this run would not train it")


def _content(config: Config, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return adapter.tensors, checked_metadata(config.init_adapter, adapter.metadata)


def _refuse(config: Config, problem: str) -> None:
    raise UserError(f"--init_adapter {config.init_adapter} {problem}; {_merge_first(config)}")


def _merge_first(config: Config, base: str | None = None) -> str:
    """Return the merge command that is the way out."""
    return (
        "to train something else on top of it, merge it first: python -m rwkv_miss merge --base"
        f" {base or config.load_model} --adapter {config.init_adapter} --out merged.pth; then give"
        " --load_model merged.pth without --init_adapter"
    )
