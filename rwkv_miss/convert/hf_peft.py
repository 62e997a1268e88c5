"""Reader of Hugging Face peft's folders: adapter_config.json with adapter_model.safetensors (or .bin).

hf_export.py writes them. A tensor's name is `base_model.model.LINEAR.PART`: the linear's name in the model
and one of PARTS.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from typing import Any

import torch
from torch import Tensor

from ..adapter_file import checked_metadata
from ..errors import UserError
from ..methods.lora import ScaledOptions
from . import hf_export, peft_forms
from .formats import Adapter, Format, Hints, described, rank_options
from .hf_export import CONFIG, CONSUMED, PREFIX, PROVENANCE, TENSORS
from .peft_names import LAYOUTS, in_pth, layout_of
from .peft_variants import NOISE, TOKENS, Content, read_beyond_factors, read_blocks, read_places, read_tokens
from .source import Source, open_source

# name of a tensor inside a linear: peft's -> ours
PARTS = {
    "miss_block": "miss",
    "bone_block": "miss",
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_B.bias": "lora_bias",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "lora_E": "lora_E",
    "lora_diag": "lora_diag",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "vera_lambda_b": "vera_lambda_b",
    "vera_lambda_d": "vera_lambda_d",
}
# names of adapter tensors of methods that are not read here
FOREIGN = re.compile(r"(^|\.)(miss_|bone_|lora_|vera_|token_adapter)")
# fields of a configuration that are read below, or do not change the tensors' meaning; others must be empty
NEUTRAL = set(
    """
    peft_type task_type auto_mapping base_model_name_or_path revision inference_mode peft_version bias r
    target_modules exclude_modules layers_to_transform layers_pattern modules_to_save init_weights
    init_lora_weights fan_in_fan_out
    """.split()
)
# further such fields for LoRA: factor, dropout, initialisation and runtime
OF_LORA = """
    lora_alpha lora_dropout rank_pattern loftq_config eva_config corda_config lora_ga_config megatron_config
    megatron_core runtime_config qalora_group_size ensure_weight_tying
"""
READ = {
    "MISS": "miss_dropout mini_r",
    "BONE": "",
    "LORA": OF_LORA
    + """
        use_rslora use_dora alpha_pattern velora_config monteclora_config kasa_config use_bdlora lora_bias
        target_parameters trainable_token_indices
    """,
    "ADALORA": OF_LORA + "target_r init_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step",
    "VERA": "projection_prng_key save_projection vera_dropout d_initial",
}
# initialisations that leave the base as it is
INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# initialisations that subtract the adapter's first product from the frozen weight
MOVED_BASES = ("pissa", "olora", "corda", "lora_ga")


class Peft(Format):
    """MiSS, Bat, mini, Bone, LoRA, rsLoRA, DoRA, AdaLoRA and VeRA.

    PiSSA, too, given the folder that was saved before the training (Hints.init).
    """

    name = "peft"
    writes = True
    layouts = LAYOUTS
    hints = ("origin", "init")

    @classmethod
    def reads(cls, source: Source) -> bool:
        return source.config_name == CONFIG

    @classmethod
    def read(cls, source: Source, hints: Hints) -> Adapter:
        kind = source.config.get("peft_type")
        if hints.origin not in ("", "peft"):
            raise UserError(
                f"{source.path} is a folder of peft, and --origin {hints.origin} is another project; drop"
                " the flag"
            )
        if not isinstance(kind, str) or kind not in READ:
            raise UserError(f"{source.path} is of peft_type {kind!r}; read are: {', '.join(READ)}")
        read = NEUTRAL.union(READ[kind].split())
        unread = [key for key, value in source.config.items() if value and key not in read]
        if unread:
            raise UserError(
                f"{source.path}: {unread[0]} = {source.config[unread[0]]!r} changes what the adapter does in"
                " a way that this package has no form for; merge it with peft (merge_and_unload) and use the"
                " model's file"
            )
        prefix, linears, whole = split(source)
        content = Content(source, hints, linears, whole)
        drop_base_weights(content)
        read_places(content)
        read_tokens(content)
        read_blocks(content)
        reader = {
            "MISS": read_miss,
            "BONE": read_miss,
            "LORA": read_lora,
            "ADALORA": read_adalora,
            "VERA": read_vera,
        }[kind]
        method, options, own = reader(content)
        about = provenance(source)
        layout = layout_of([*own, *whole], bool(about.get("arch")))
        views = {in_pth(layout, name): dataclasses.asdict(view) for name, view in content.views.items()}
        own = {in_pth(layout, name): parts for name, parts in own.items()}
        whole = {name if name.startswith("shared.") else in_pth(layout, name): t for name, t in whole.items()}
        for field in options.keys() & {"rank_map", "alpha_map"}:
            options[field] = {in_pth(layout, name): value for name, value in options[field].items()}
        tensors = {f"{name}.{part}": tensor for name, parts in own.items() for part, tensor in parts.items()}
        origin = (
            {}
            if method == "pissa" or kind in ("BONE", "ADALORA") or content.changed
            else {"origin": {"format": "peft", "config": source.config, "prefix": prefix, "layout": layout}}
        )
        parts = [part for part in ("emb", "head") if f"{part}.weight" in whole]
        metadata = described(method, options, list(own), train_parts=parts, views=views, **origin)
        if kind == "ADALORA":
            content.notes.append("AdaLoRA has become a LoRA, its singular values multiplied into B")
        return Adapter(
            {**tensors, **whole}, checked_metadata(source.path, {**metadata, **about}), content.notes
        )

    @classmethod
    def write(cls, adapter: Adapter, out: str | os.PathLike[str]) -> list[str]:
        return hf_export.write(adapter, out)


def provenance(source: Source) -> dict[str, Any]:
    """Return this package's record in the header of a folder's tensors: the base, the step, the tokenizer."""
    try:
        record = json.loads(source.header.get(PROVENANCE, "{}"))
    except (ValueError, TypeError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(
            f"{source.path}: {PROVENANCE} in the header of {TENSORS} is no JSON object; the file is damaged"
        )
    return {name: value for name, value in record.items() if name not in CONSUMED}


def split(source: Source) -> tuple[str, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Split the tensors: (prefix, linear -> its tensors by our names, whole tensors by the model's names).

    Raises UserError for any other tensor.
    """
    prefix = PREFIX if all(key.startswith("base_model.") for key in source.tensors) else ""
    linears: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in source.tensors.items():
        name = key.removeprefix(prefix)
        part = next((part for part in PARTS if name.endswith(f".{part}")), None)
        if any(noise in name for noise in NOISE):
            continue
        if part:
            linears.setdefault(name.removesuffix(f".{part}"), {})[PARTS[part]] = tensor
        elif key in ("base_model.vera_A", "base_model.vera_B"):
            whole[f"shared.{key.removeprefix('base_model.')}"] = tensor.float()
        elif FOREIGN.search(name) and not name.endswith(TOKENS):
            raise UserError(
                f"{source.path} holds {key}, neither a tensor of an adapted linear nor one of the model;"
                " merge it with peft instead"
            )
        else:
            whole[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
    noise = sum(any(noise in key for noise in NOISE) for key in source.tensors)
    if len(source.tensors) != noise + len(whole) + sum(map(len, linears.values())):
        raise UserError(
            f"{source.path} names a tensor twice, in an older and in a newer way; save it again with peft"
        )
    if not linears:
        raise UserError(
            f"{source.path} adapts no linear; its first tensors are"
            f" {', '.join(list(source.tensors)[:3]) or 'none'}"
        )
    return prefix, linears, whole


def drop_base_weights(content: Content) -> None:
    """Drop the base's weights of adapted linears: peft's save_pretrained() adds those of embeddings.

    Raises UserError for any other tensor of an adapted linear, and for a weight that can't be compared with
    the base's or differs from it.
    """
    source = content.source
    for name in [name for name in content.whole if name.rpartition(".")[0] in content.linears]:
        if not name.endswith(".weight"):
            raise UserError(
                f"{source.path} trains {name}, of an adapted linear, as well (bias:"
                f" {source.config.get('bias')!r}); this package has no form for that: merge it with peft"
                " instead"
            )
        if not content.hints.base:
            raise UserError(
                f"{source.path} holds {name}, of an adapted layer, as peft saves embeddings by default; give"
                " the base, its file or folder, to see whether it is unchanged: --base MODEL; or save with"
                " save_pretrained(..., save_embedding_layers=False)"
            )
        tensor = content.whole.pop(name)
        weight = content.of_base([name], "").get(name)
        if weight is None or not torch.equal(weight.to(tensor.dtype), tensor):
            raise UserError(
                f"{source.path} holds {name}, of an adapted layer, and --base {content.hints.base} has"
                " another one; give the base that the adapter was trained on, or merge it with peft instead"
            )


def expect(source: Source, linears: dict[str, dict[str, Tensor]], *parts: str) -> None:
    """Raise UserError unless every linear has exactly these tensors."""
    for name, own in linears.items():
        if set(own) != set(parts):
            raise UserError(
                f"{source.path}: {name} has {', '.join(sorted(own))}; {source.config['peft_type']} as it is"
                f" configured needs {', '.join(sorted(parts))}"
            )


def number(source: Source, field: str, default: Any, kind: type = int) -> Any:
    """Read a number of the configuration. Raises UserError for a field that holds anything else."""
    value = source.config.get(field)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        raise UserError(f"{source.path}: {field} is {value!r}, expected a number")
    return value


# (method, its options, linear -> its tensors)
MethodParts = tuple[str, dict[str, Any], dict[str, dict[str, Tensor]]]


def read_miss(content: Content) -> MethodParts:
    """Read MiSS (r, out), Bat (out / r, r, r) by output blocks, and mini (r, mini_r)."""
    source, linears = content.source, content.linears
    expect(source, linears, "miss")
    rank, init = number(source, "r", 64), source.config.get("init_weights", True)
    mini = number(source, "mini_r", 1) if init == "mini" else 0
    if init not in (True, False, "bat", "mini"):
        raise UserError(
            f"{source.path}: init_weights {init!r} is unknown; read are true, false, 'bat' and 'mini'"
        )
    for name, own in linears.items():
        shape = tuple(own["miss"].shape)
        wanted = f"(out / {rank}, {rank}, {rank})" if init == "bat" else f"({rank}, {mini or 'out'})"
        fits = (
            shape[1:] == (rank, rank)
            if init == "bat"
            else len(shape) == 2 and shape[0] == rank and (not mini or shape[1] == mini)
        )
        if not fits:
            raise UserError(
                f"{source.path}: the tensor of {name} is {shape}, r = {rank} and init_weights = {init!r} need"
                f" {wanted}"
            )
    if init == "bat":
        return (
            "bat",
            {"rank": rank, "order": "col"},
            {name: {"bat": own["miss"]} for name, own in linears.items()},
        )
    return "miss", {"rank": rank, "mini_r": mini}, linears


def read_lora(content: Content) -> MethodParts:
    """Read LoRA and DoRA, or PiSSA and its relatives with their initial factors."""
    source, linears, hints = content.source, content.linears, content.hints
    config = source.config
    dora, init = bool(config.get("use_dora")), config.get("init_lora_weights", True)
    more = {"magnitude": dora, "lora_bias": config.get("lora_bias"), "lora_diag": config.get("kasa_config")}
    expect(source, linears, "lora_A", "lora_B", *(part for part, there in more.items() if there))
    options = lora_options(content)
    moved = isinstance(init, str) and init.lower().startswith(MOVED_BASES)
    if not moved and init not in INITS:
        raise UserError(
            f"{source.path}: what init_lora_weights = {init!r} did to the base is not known here (LoftQ's is"
            " quantised, and in no file); merge it with peft instead"
        )
    if not moved and not hints.init:
        return ("dora" if dora else "lora"), options, linears
    if not hints.init:
        raise UserError(
            f"{source.path}: init_lora_weights = {init!r} took the adapter's first product out of the base,"
            " and that product is not in the folder. Give the folder that was saved before training, --init"
            " FOLDER, or save with peft's path_initial_model_for_weight_conversion"
        )
    if dora:
        raise UserError(
            f"{source.path}: use_dora together with --init has no form here; merge it with peft instead"
        )
    _, first, _ = split(initial := open_source(hints.init))
    expect(initial, first, "lora_A", "lora_B")
    if extra := first.keys() - linears.keys():
        raise UserError(
            f"--init {hints.init} is of another training: {min(extra)} is not adapted in {source.path}"
        )
    for name, own in linears.items():
        shapes = [{part: tuple(t.shape) for part, t in parts.items()} for parts in (own, first.get(name, {}))]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"--init {hints.init} is of another training: {name} has {shapes[1] or 'nothing'} there,"
                f" {shapes[0]} in {source.path}"
            )
        own |= {f"initial_{part[-1]}": tensor for part, tensor in first[name].items()}
    return (
        "pissa",
        {**options, "niter": int(str(init)[12:]) if re.fullmatch(r"pissa_niter_\d{1,3}", str(init)) else 0},
        linears,
    )


def lora_options(content: Content) -> dict[str, Any]:
    """Read ranks, alphas and dropout of a LoRA.

    Raises UserError if the configuration's ranks differ from the tensors'.
    """
    source = content.source
    config = source.config
    ranks, alphas = {}, {}
    rank, rank_of = number(source, "r", 8), patterns(source, "rank_pattern")
    alpha, alpha_of = number(source, "lora_alpha", 8, float), patterns(source, "alpha_pattern")
    for name, own in content.linears.items():
        A, B, theirs = own["lora_A"], own["lora_B"], content.theirs.get(name, name)
        ranks[name] = peft_forms.matched(rank_of, theirs, rank)
        alphas[name] = peft_forms.matched(alpha_of, theirs, alpha)
        if A.dim() != 2 or B.dim() != 2 or not len(A) == B.shape[1] == ranks[name]:
            shapes = f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}"
            raise UserError(f"{source.path}: {name} has {shapes}; the configuration says rank {ranks[name]}")
        if not isinstance(alphas[name], (int, float)) or not 0 < alphas[name] < math.inf:
            raise UserError(
                f"{source.path}: lora_alpha of {name} is {alphas[name]!r}, expected a number above 0"
            )
    rslora = bool(config.get("use_rslora"))
    read_beyond_factors(content, ranks, alphas, rslora)
    return scaled_options(
        ranks,
        alphas,
        rslora=rslora,
        dropout=number(source, "lora_dropout", 0.0, float),
    )


def scaled_options(ranks: dict[str, int], alphas: dict[str, float], **others: Any) -> dict[str, Any]:
    """Turn each linear's rank and alpha into options of the LoRA family.

    Linears with the most frequent rank and alpha are not named.
    """
    options = {
        **rank_options(ranks),
        "alpha": max(alphas.values(), key=list(alphas.values()).count),
        **others,
    }
    parsed = ScaledOptions.parse(options)
    options["alpha_map"] = {name: alpha for name, alpha in alphas.items() if parsed.at(name).alpha != alpha}
    parsed = ScaledOptions.parse(options)
    if any((parsed.at(name).rank, parsed.at(name).alpha) != (ranks[name], alphas[name]) for name in ranks):
        options |= {"rank_map": ranks, "alpha_map": alphas}  # name all: one name is the end of another
    return options


def patterns(source: Source, field: str) -> list[tuple[re.Pattern, Any]]:
    """Compile the patterns in a field.

    Raises UserError for groups and for many wildcards: matching them may take for ever.
    """
    given = source.config.get(field) or {}
    if not isinstance(given, dict):
        raise UserError(f"{source.path}: {field} is {given!r}, expected names with numbers")
    for pattern in given:
        if not re.fullmatch(r"[\w.\\^$*+?|-]{1,300}", pattern) or pattern.count("*") + pattern.count("+") > 1:
            raise UserError(
                f"{source.path}: {pattern!r} in {field} is more than a name with a wildcard; write out the"
                " names there"
            )
    try:
        return peft_forms.compiled(given)
    except re.error as error:
        raise UserError(
            f"{source.path}: an expression in {field} is none ({error}: {error.pattern!r})"
        ) from None


def read_adalora(content: Content) -> MethodParts:
    """Read AdaLoRA as a LoRA whose B is multiplied by the singular values.

    peft's factor is alpha / (init_r + 1e-5).
    """
    source, linears = content.source, content.linears
    expect(source, linears, "lora_A", "lora_B", "lora_E")
    alpha, first = number(source, "lora_alpha", 8, float), number(source, "init_r", 12)
    if first < 1:
        raise UserError(f"{source.path}: init_r is {first}, expected a rank")
    scale = (alpha if alpha > 0 else first) / (first + 1e-5)
    ranks, alphas, merged = {}, {}, {}
    for name, own in linears.items():
        A, B, E = own["lora_A"], own["lora_B"], own["lora_E"]
        if A.dim() != 2 or B.dim() != 2 or not len(A) == B.shape[1] == E.numel():
            shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in own.items())
            raise UserError(f"{source.path}: {name} has {shapes}, which are of several ranks")
        if len(A) == 0:
            continue  # every rank of this linear was pruned
        ranks[name] = len(A)
        alphas[name] = scale * len(A)
        merged[name] = {"lora_A": A.float(), "lora_B": B.float() * E.float().flatten()}
    if not merged:
        raise UserError(f"{source.path}: no linear has a singular value left; the adapter changes nothing")
    return "lora", scaled_options(ranks, alphas, dropout=number(source, "lora_dropout", 0.0, float)), merged


def read_vera(content: Content) -> MethodParts:
    """Read VeRA whose random matrices are in the folder (save_projection)."""
    source, linears, whole = content.source, content.linears, content.whole
    expect(source, linears, "vera_lambda_b", "vera_lambda_d")
    if not {"shared.vera_A", "shared.vera_B"} <= whole.keys():
        raise UserError(
            f"{source.path} has no vera_A and vera_B: they follow from a seed that other versions of torch"
            " read differently; save with save_projection=True"
        )
    rank = number(source, "r", 256)
    for name, own in linears.items():
        if tuple(own["vera_lambda_d"].shape) != (rank,) or own["vera_lambda_b"].dim() != 1:
            raise UserError(
                f"{source.path}: {name} has vectors of {tuple(own['vera_lambda_d'].shape)} and"
                f" {tuple(own['vera_lambda_b'].shape)}; r = {rank} needs ({rank},) and (out,)"
            )
    return "vera", {"rank": rank, "d_initial": number(source, "d_initial", 0.1, float)}, linears
