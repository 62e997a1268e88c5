"""Files of RWKV-PEFT in all its generations, and of RWKV-LM-RLHF, which began with RWKV-PEFT's code.

The files are flat dicts without metadata.

| tensor | shape | written by | here |
|---|---|---|---|
| `.bone` | (out, r), (out / r, r, r) | the first Bone | bat, order col |
| `.bone` | (in / r, r, r) | RWKV-PEFT from 2024-09, RWKV-LM-RLHF | bat, order row |
| `.bone`, `.disha` | (r, out), (in / r, r, r) | RWKV-PEFT from 2024-11, 2025-02 | miss; bat, order row |
| `.lora_A`, `.lora_B` | (r, in), (out, r) | both | lora; pissa with the factors at the start, which are in a
file of their own |
| `.att.time_state` | (heads, N, N) | both | state |

A file may also have whole tensors, under the base's names, which replace the base's tensors.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter import METHODS
from ..errors import UserError
from ..files.checkpoint import read_checkpoint, write_checkpoint
from ..files.output import require_writable
from ..methods.miss_variants import beyond_plain
from ..methods.whole_tensors import PARTS
from .formats import Adapter, Format, Hints, described, origins, rank_options
from .profile import read_alphas
from .source import Source
from .widths import origin_of_blocks

PREFIXES = ("_forward_module.", "model.")  # DeepSpeed's, and RWKV-PEFT's LightningModule's
FACTOR = re.compile(r"(.+)\.(bone|disha|lora_A|lora_B)")
STATE = re.compile(PARTS["state"])
# names of whole tensors in RWKV-6 and RWKV-7
WHOLE = re.compile(
    "|".join(
        [
            *PARTS.values(),
            r"blocks\.\d+\.((att|ffn)\.(receptance|key|value|gate|output)\.weight|att\.[wavg][012])",
        ]
    )
)
REFUSED = {
    r".+\.(bone|lora_[AB])_expert_\d+|.*\b(router|moe_\w+)\b.*": (
        "is of a mixture of experts (RWKV-LM-RLHF), which RWKV-6 and RWKV-7 are not"
    ),
    r".+\.lora_M": (
        "is of DoRA with a norm for every input (RWKV-LM-RLHF); here, as in HF peft, there is one for every"
        " output. Merge it there"
    ),
    r"emb\.(bone|disha|lora_[AB])": "adapts the embedding, which is no linear",
}
FOREIGN = re.compile("|".join([FACTOR.pattern, *REFUSED]))


class RwkvPeft(Format):
    """Format that RWKV-PEFT's and RWKV-LM-RLHF's trainers save, and RWKV-PEFT's merge scripts take.

    An adapter is a .pth file; a PiSSA is two files.
    """

    name = "rwkv-peft"
    writes = True
    hints = ("origin", "alpha", "init", "profile")

    @classmethod
    def reads(cls, source: Source) -> bool:
        no_words = source.config.keys() <= {"format"}  # every safetensors file may have this key
        # a file of initial states, whose metadata read_described() has made up
        states = source.config.get("method") == "state" and not source.describes_itself
        silent = no_words or states
        names = list(map(stripped, source.tensors))
        states = bool(names) and all(map(STATE.fullmatch, names))
        return silent and not source.config_name and (states or any(map(FOREIGN.fullmatch, names)))

    @classmethod
    def read(cls, source: Source, hints: Hints) -> Adapter:
        try:
            return cls.read_tensors(source.tensors, hints)
        except UserError as error:
            raise UserError(f"{source.path}: {error}") from None

    @classmethod
    def read_tensors(cls, tensors: dict[str, Tensor], hints: Hints) -> Adapter:
        """Read the adapter from a file's tensors."""
        tensors, notes = plain_names(tensors)
        factors, whole = sort_out(tensors)
        kind = next(iter(factors), "").partition("_")[0]  # bone, disha or lora
        check_use(kind, any(map(STATE.fullmatch, whole)), hints)
        if kind == "lora":
            method, options, linears, initial = *read_lora(factors, hints), initial_factors(factors, hints)
        elif kind:
            method, options, linears, initial = *read_blocks(tensors, factors[kind], kind, hints.origin), {}
        else:
            method, options, linears, initial = "state", {}, [], {}
        if any(map(STATE.fullmatch, whole)):
            notes += turn_states(tensors, hints.origin)
        renamed = {
            f"{found[1]}.{method}" if (found := FACTOR.fullmatch(name)) and kind != "lora" else name: t
            for name, t in tensors.items()
        }
        parts = [
            part
            for part, pattern in PARTS.items()
            if part != method and any(re.fullmatch(pattern, name) for name in whole)
        ]
        metadata = described(
            method, options, linears, train_parts=parts, origin={"format": "rwkv-peft", "tensor": kind}
        )
        return Adapter({**renamed, **initial}, metadata, notes)

    @classmethod
    def write(cls, adapter: Adapter, out: str | os.PathLike[str]) -> list[str]:
        method, options = adapter.method, adapter.options
        notes = check_form(method, options, adapter.metadata["linears"])
        tensors = dict(adapter.tensors)
        if method in ("miss", "bat"):
            origin = adapter.metadata.get("origin")
            leaf = origin.get("tensor") if isinstance(origin, dict) else None
            leaf = leaf if leaf in ("bone", "disha") else "disha"
            names = {f"{linear}.{method}": f"{linear}.{leaf}" for linear in adapter.metadata["linears"]}
            tensors = {names.get(name, name): tensor for name, tensor in tensors.items()}
        if method == "pissa":
            both = [(linear, side) for linear in adapter.metadata["linears"] for side in "AB"]
            initial = {
                f"{linear}.init_lora_{side}": tensors.pop(f"{linear}.initial_{side}") for linear, side in both
            }
            initial_file = write_initial(out, initial)
            notes.append(
                f"the factors that the training began with are in {initial_file}: --lora_init there, --init"
                " here"
            )
        try:
            write_checkpoint(out, tensors.items())
        except BaseException:
            if method == "pissa":
                initial_file.unlink()
            raise
        return notes


def stripped(name: str) -> str:
    """Strip the prefixes of the trainers from a tensor's name."""
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def plain_names(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the tensors as in the base; returns a note if names changed.

    Raises UserError for two tensors with one name.
    """
    plain = {stripped(name): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise UserError(
            f"{len(tensors)} tensors have only {len(plain)} names without {' and '.join(PREFIXES)}"
        )
    prefixes = " and ".join(
        prefix for prefix in PREFIXES if any(prefix in name for name in tensors.keys() - plain.keys())
    )
    return plain, [f"{prefixes} was taken off the names of the tensors"] if prefixes else []


def sort_out(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Sort tensors: (bone, disha, lora_A and lora_B -> linear -> tensor, whole tensors by name).

    Raises UserError that names a tensor that can't be read.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, reason in REFUSED.items():
            if re.fullmatch(pattern, name):
                raise UserError(f"{name} {reason}")
        if not tensor.is_floating_point() or tensor.itemsize == 1 or not tensor.numel():
            raise UserError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, expected numbers in fp32, bf16 or fp16"
            )
        if found := FACTOR.fullmatch(name):
            factors.setdefault(found[2], {})[found[1]] = tensor
        elif WHOLE.fullmatch(name):
            whole[name] = tensor
        else:
            raise UserError(
                f"{name} is no adapter's tensor and none of RWKV-6 or RWKV-7; what it should change is not"
                " known"
            )
    kinds = sorted({kind.partition("_")[0] for kind in factors})
    if len(kinds) > 1:
        raise UserError(f"the file has tensors of {' and '.join(kinds)}; one method in a file is expected")
    for linear in itertools.chain(*factors.values()):
        if f"{linear}.weight" in whole:
            raise UserError(
                f"{linear} has a weight of its own in the file, and an adapter on top; only the project that"
                " wrote it can merge that"
            )
    return factors, whole


def check_use(kind: str, states: bool, hints: Hints) -> None:
    """Raise UserError for a hint that does not apply to this kind of file."""
    flags = [name for name in ("alpha", "profile", "init") if getattr(hints, name) not in ("", None)]
    if flags and kind != "lora":
        found = f".{kind} tensors" if kind else "initial states alone"
        raise UserError(f"--{flags[0]} is for LoRA and PiSSA, and the file has {found}; drop the flag")
    if len(flags) > 1:
        raise UserError(
            f"--{flags[0]} and --{flags[1]} contradict each other: --alpha is the same for all layers,"
            " --profile has one for each, and PiSSA, for which --init is, has the factor 1; keep one of the"
            " flags"
        )
    if (
        hints.origin
        and kind in ("", "lora")
        and (not states or hints.origin not in ("rwkv-peft", "openmose"))
    ):
        raise UserError(
            f"--origin {hints.origin} decides nothing in a file of {'LoRA' if kind else 'initial states'};"
            " drop the flag" + (f", or choose from: {origins('rwkv-peft', 'openmose')}" if states else "")
        )


def read_blocks(
    tensors: dict[str, Tensor], blocks: dict[str, Tensor], kind: str, hint: str
) -> tuple[str, dict[str, Any], list[str]]:
    """Return (method, options, linears) of .bone or .disha tensors.

    Tensors of the first Bone with two dimensions are replaced in `tensors` by ones with three.
    """
    dims = {tensor.dim() for tensor in blocks.values()}
    for linear, tensor in blocks.items():
        if tensor.dim() not in (2, 3) or tensor.dim() == 3 and tensor.shape[1] != tensor.shape[2]:
            raise UserError(
                f"{linear}.{kind} is {list(tensor.shape)}, expected (r, outputs) or (blocks, r, r)"
            )
    if len(dims) > 1:
        raise UserError(
            f"the .{kind} tensors have two dimensions for some linears and three for others; one method in a"
            " file is expected"
        )
    origin = origin_of_blocks(blocks, hint)
    if dims == {2} and origin == "rwkv-peft":
        return (
            "miss",
            rank_options({linear: tensor.shape[0] for linear, tensor in blocks.items()}),
            list(blocks),
        )
    for linear, tensor in blocks.items():
        rank = tensor.shape[-1]
        tensors[f"{linear}.{kind}"] = tensor.reshape(-1, rank, rank)
    ranks = rank_options({linear: tensor.shape[-1] for linear, tensor in blocks.items()})
    return "bat", {**ranks, "order": "row" if origin == "rwkv-peft" else "col"}, list(blocks)


def read_lora(factors: dict[str, dict[str, Tensor]], hints: Hints) -> tuple[str, dict[str, Any], list[str]]:
    """Return (method, options, linears) of lora_A and lora_B."""
    ranks: dict[str, int] = {}
    A, B = (factors.get(f"lora_{side}", {}) for side in "AB")
    for linear in {**A, **B}:
        if linear not in A or linear not in B:
            raise UserError(
                f"{linear} has lora_{'A' if linear in A else 'B'} without lora_{'B' if linear in A else 'A'}"
            )
        if A[linear].dim() != 2 or B[linear].dim() != 2 or len(A[linear]) != B[linear].shape[1]:
            raise UserError(
                f"{linear} has lora_A {list(A[linear].shape)} and lora_B {list(B[linear].shape)}, expected"
                " (r, inputs) and (outputs, r)"
            )
        ranks[linear] = len(A[linear])
    options = rank_options(ranks)
    if hints.init:
        return "pissa", options, list(ranks)
    if hints.profile:
        alphas = read_alphas(hints.profile, ranks)
        options["alpha"] = next(alpha for linear, alpha in alphas.items() if ranks[linear] == options["rank"])
        # a linear without an entry in alpha_map has the common alpha / r
        others = METHODS["lora"].Options.parse(options)
        return (
            "lora",
            {
                **options,
                "alpha_map": {
                    name: alpha for name, alpha in alphas.items() if others.at(name).alpha != alpha
                },
            },
            list(ranks),
        )
    if hints.alpha is None:
        raise UserError(
            "the file does not hold LoRA's alpha: give the alpha of the training with --alpha (the flag was"
            " lora_alpha). A PiSSA file looks the same: then --init FILE instead, the init_pissa.pth"
            " in the same folder"
        )
    if not 0 < hints.alpha < math.inf:
        raise UserError(f"--alpha {hints.alpha:g} is no factor; it must be above 0")
    if options["rank_map"]:
        raise UserError(
            f"the ranks differ ({', '.join(map(str, sorted(set(ranks.values()))))}), and with them the"
            " factors alpha / r; one --alpha cannot say them. --profile FILE does, the layer profile of"
            " RWKV-LM-RLHF"
        )
    return "lora", {**options, "alpha": hints.alpha}, list(ranks)


def initial_factors(factors: dict[str, dict[str, Tensor]], hints: Hints) -> dict[str, Tensor]:
    """Read PiSSA's initial factors from the file hints.init, under this package's names; {} without one."""
    if not hints.init:
        return {}
    found, _ = plain_names(read_checkpoint(hints.init))
    initial: dict[str, Tensor] = {}
    for side in "AB":
        for linear, tensor in factors[f"lora_{side}"].items():
            first = found.pop(f"{linear}.init_lora_{side}", None)
            if first is None or first.shape != tensor.shape or not first.is_floating_point():
                seen = "no such tensor" if first is None else f"{first.dtype} {list(first.shape)}"
                raise UserError(
                    f"{hints.init}: {linear}.init_lora_{side} should be {list(tensor.shape)}, found {seen};"
                    " it is of another training"
                )
            initial[f"{linear}.initial_{side}"] = first
    if found:
        raise UserError(
            f"{hints.init} holds {next(iter(found))} too, which the adapter has no tensor for; it is of"
            " another training"
        )
    return initial


def turn_states(tensors: dict[str, Tensor], origin: str) -> list[str]:
    """Turn the initial states in `tensors` to (heads, value, key); returns notes."""
    states = {name: tensor for name, tensor in tensors.items() if STATE.fullmatch(name)}
    for name, tensor in states.items():
        if tensor.dim() != 3 or tensor.shape[1] != tensor.shape[2]:
            raise UserError(f"{name} is {list(tensor.shape)}, expected (heads, N, N)")
    if origin == "openmose":
        tensors |= {name: tensor.mT for name, tensor in states.items()}
        return [
            "the initial states were (heads, key, value) and are transposed; without --fla 1 they would not"
            " be: --origin rwkv-peft"
        ]
    if origin:
        return []
    return [
        "the initial states are taken as (heads, value, key), as released ones are; those of"
        f" RWKV-LM-RLHF may be others: {origins('openmose')}"
    ]


def check_form(method: str, options: Any, linears: list[str]) -> list[str]:
    """Check that RWKV-PEFT's files can hold the method and its options; returns notes."""
    if method not in ("miss", "bat", "lora", "lora_fa", "pissa", "state"):
        raise UserError(
            f"RWKV-PEFT has no form for {method}; it has miss, bat with order row, lora, pissa and state."
            " Merge the adapter instead"
        )
    if method == "miss" and (other := beyond_plain(options)):
        raise UserError(f"RWKV-PEFT has no form for MiSS with {other}; merge the adapter instead")
    if method == "bat" and options.order != "row":
        raise UserError(
            "RWKV-PEFT's scripts merge Bat with order row alone, and would read this adapter as one; merge"
            " the adapter instead"
        )
    if method in ("lora", "lora_fa"):
        own = [options.at(linear) for linear in linears]
        alphas = {layer.scale * layer.rank if layer.rslora else layer.alpha for layer in own}
        if len(alphas) > 1:
            raise UserError(
                "RWKV-PEFT's scripts take one alpha for all linears, and this LoRA has"
                f" {', '.join(f'{a:g}' for a in sorted(alphas))}; merge the adapter instead"
            )
        alpha = alphas.pop()
        script = (
            f"merge/merge.py --type lora --lora_alpha {alpha:g}"
            if alpha == int(alpha)
            else f"merge/merge_lora.py {alpha!r}"
        )
        return [f"the file does not hold alpha: {script} there, --alpha {alpha!r} here"]
    if method == "pissa" and options.scale != 1:
        raise UserError(
            f"RWKV-PEFT has PiSSA with the factor 1 alone, this one has {options.scale:g}; merge the adapter"
            " instead"
        )
    return []


def write_initial(out: str | os.PathLike[str], tensors: dict[str, Tensor]) -> Path:
    """Write PiSSA's initial factors to a new file in the folder of `out`; returns its path."""
    require_writable(out)
    path = Path(out).with_name(f"{Path(out).stem}.init_pissa.pth")
    if path.exists():
        raise UserError(
            f"{path}, where the factors at the start would be written, exists; move it away, or choose"
            " another OUT"
        )
    write_checkpoint(path, tensors.items())
    return path
