"""MiSS adapters of rwkv_lightning_cuda.

D is (out, r) in half precision, and the weight changes by scale D P with scale = alpha / r.

An adapter is a folder with adapter.json (the manifest) and adapter.pth; or one .pth with the manifest in the
record archive/miss.json; or a checkpoint of a training, whose `.D.master` is in fp32. The loader there checks
the SHA-256 of the model file, which the manifest names, and the manifest's own digest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files.checkpoint import is_finite, memory, read_metadata, write_checkpoint
from ..files.output import write_folder, write_text
from ..methods.miss_variants import beyond_plain
from .base import adapted_layers, linear_shapes, sha256
from .formats import Adapter, Format, Hints, described, origin_of
from .source import Source

CONFIG, TENSORS, CHECKPOINT, EMBEDDED = "adapter.json", "adapter.pth", "checkpoint.json", "miss.json"
# the linears of a block, in the order of rwkv_lightning's packages
TARGETS = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
PACKAGE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
FIXED = {"format_version": 1, "kind": "inference_adapter", "method": "miss", "layout": "modulo_rank_zero_pad"}
LARGEST_RANK = 1024
WAY_OUT = "merge the adapter into its base (rwkv-miss merge) and serve that"


class Lightning(Format):
    """Format of rwkv_lightning_cuda. Reading multiplies the scale into D.

    The manifest is kept, so that a package that is written again has the same bits. An output whose name ends
    in .pth is one file, as that project's page uploads it; any other is a folder.
    """

    name = "rwkv-lightning"
    writes = True

    @classmethod
    def reads(cls, source: Source) -> bool:
        if source.config_name:
            return source.config_name in (CONFIG, CHECKPOINT)
        return any(name.endswith((".weight.D", ".weight.D.master")) for name in source.tensors)

    @classmethod
    def read(cls, source: Source, hints: Hints) -> Adapter:
        manifest, trained = manifest_of(source)
        check_manifest(source.path, manifest, trained)
        scale, tensors = fp32(manifest["scale"]), {}
        for target in manifest["targets"]:
            name = target["name"] + (".master" if trained else "")
            D = source.tensors.get(name)
            dtype = torch.float32 if trained else PACKAGE_DTYPES[manifest["dtype"]]
            if D is None or list(D.shape) != target["shape"] or D.dtype != dtype:
                found = "nothing" if D is None else f"{tuple(D.shape)}, {D.dtype}"
                raise UserError(
                    f"{source.path}: {name} is {found}, its manifest says {tuple(target['shape'])}, {dtype}"
                )
            tensors[target["name"].removesuffix(".weight.D") + ".miss"] = (D.float() * scale).t().contiguous()
        if not trained:
            check_content(source, manifest)
        linears = [name.removesuffix(".miss") for name in tensors]
        if trained:
            return Adapter(tensors, described("miss", {"rank": manifest["rank"]}, linears))
        origin = {"format": "rwkv-lightning", "manifest": manifest}
        shapes = {
            name: (target["shape"][0], target["in_features"])
            for name, target in zip(linears, manifest["targets"])
        }
        return Adapter(
            tensors, described("miss", {"rank": manifest["rank"]}, linears, origin=origin), shapes=shapes
        )

    @classmethod
    def write(cls, adapter: Adapter, out: str | os.PathLike[str]) -> list[str]:
        adapter, manifest = with_manifest(adapter)
        dtype, scale = PACKAGE_DTYPES[manifest["dtype"]], fp32(manifest["scale"])
        D = columns(adapter)
        tensors, lost, whole = {}, 0.0, 0.0
        for name in (target["name"].removesuffix(".weight.D") for target in manifest["targets"]):
            kept = (D[name] / scale).to(dtype)
            if not is_finite(kept) or kept.abs().max() > torch.finfo(torch.float16).max:
                raise UserError(
                    f"{name} has values beyond fp16's largest, 65504, in which rwkv_lightning computes"
                )
            tensors[f"{name}.weight.D"] = kept
            lost += float((kept.float() * scale - D[name]).square().sum())
            whole += float(D[name].square().sum())
        manifest["content_version"] = digest(manifest, tensors)
        if os.fspath(out).endswith(".pth"):
            write_checkpoint(out, tensors.items(), manifest, EMBEDDED)
        else:
            write_folder(
                out,
                {
                    CONFIG: lambda path: write_text(path, canonical(manifest) + "\n"),
                    TENSORS: lambda path: write_checkpoint(path, tensors.items()),
                },
            )
        notes = (
            [f"rounding D to {manifest['dtype']} lost {(lost / whole) ** 0.5:.2g} of it (||lost|| / ||D||)"]
            if lost
            else []
        )
        if len(tensors) == 1:
            notes.append(
                "rwkv_lightning's reader of .pth files skips the tensor of a file that has only one; adapt"
                " two linears or more"
            )
        return notes


def manifest_of(source: Source) -> tuple[dict[str, Any], bool]:
    """Return (the manifest, whether the tensors come from a training checkpoint).

    If a checkpoint has no manifest, it is made from the checkpoint's configuration.
    """
    if source.config_name == CONFIG:
        return source.config, False
    embedded = read_metadata(
        f"{source.path}/training.pth" if source.config_name == CHECKPOINT else source.path, EMBEDDED
    )
    if embedded is not None:
        tensors_are = embedded.pop("tensor_source", "D")
        if tensors_are not in ("D", "master"):
            raise UserError(
                f"{source.path}: tensor_source {tensors_are!r} is unknown; read are 'D' and 'master'"
            )
        return embedded, tensors_are == "master"
    config = source.config.get("config")
    if source.config_name != CHECKPOINT or not isinstance(config, dict):
        raise UserError(
            f"{source.path} holds D of rwkv_lightning without its manifest; give the folder with"
            " adapter.json, or with checkpoint.json"
        )
    targets = [
        {"name": name.removesuffix(".master"), "shape": list(t.shape)}
        for name, t in source.tensors.items()
        if name.endswith(".D.master")
    ]
    rank, alpha = config.get("rank"), config.get("alpha")
    scale = alpha / rank if number(alpha) and number(rank) and rank else None
    return {
        **FIXED,
        "dtype": "float16",
        "rank": rank,
        "alpha": alpha,
        "scale": scale,
        "base_fingerprint": config.get("base_fingerprint"),
        "targets": targets,
    }, True


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def fp32(value: float) -> float:
    """Round a number to a C++ float."""
    return float(torch.tensor(value, dtype=torch.float32))


def check_manifest(path: str | os.PathLike[str], manifest: dict[str, Any], trained: bool) -> None:
    """Raise UserError for a manifest that rwkv_lightning's loader refuses, and for a scale of zero."""
    check_fields(path, manifest)
    check_targets(path, manifest, trained)


def check_fields(path: str | os.PathLike[str], manifest: dict[str, Any]) -> None:
    """Check all fields of the manifest but "targets"."""
    for field, value in FIXED.items():
        if manifest.get(field) != value:
            raise UserError(
                f"{path}: {field} is {manifest.get(field)!r}, expected {value!r}; it is no MiSS adapter of"
                " rwkv_lightning"
            )
    rank, scale, base = (manifest.get(field) for field in ("rank", "scale", "base_fingerprint"))
    if manifest.get("dtype") not in [*PACKAGE_DTYPES]:  # a list, because the value may be unhashable
        raise UserError(
            f"{path}: dtype is {manifest.get('dtype')!r}, expected one of: {', '.join(PACKAGE_DTYPES)}"
        )
    if type(rank) is not int or not 0 < rank <= LARGEST_RANK:
        raise UserError(f"{path}: rank is {rank!r}, expected a number from 1 to {LARGEST_RANK}")
    numbers = number(scale) and number(manifest.get("alpha"))
    if not numbers or not math.isfinite(fp32(scale)) or not fp32(scale):
        raise UserError(
            f"{path}: scale is {scale!r} and alpha {manifest.get('alpha')!r}, expected numbers, and a scale"
            " that is not zero"
        )
    if not isinstance(base, str) or not re.fullmatch(r"[0-9a-f]{64}", base):
        raise UserError(f"{path}: base_fingerprint is {base!r}, expected a SHA-256 in hex")


def check_targets(path: str | os.PathLike[str], manifest: dict[str, Any], trained: bool) -> None:
    """Check the targets of the manifest: their names, shapes and widths."""
    rank, targets = manifest["rank"], manifest.get("targets")
    names = []
    if isinstance(targets, list):
        names = [target.get("name") if isinstance(target, dict) else None for target in targets]
    form = rf"blocks\.\d{{1,4}}\.({'|'.join(map(re.escape, TARGETS))})\.weight\.D"
    for name in names or [None]:
        if not isinstance(name, str) or not re.fullmatch(form, name):
            raise UserError(
                f"{path}: the target {name!r} is none of blocks.N.{{{','.join(TARGETS)}}}.weight.D"
            )
    if len(set(names)) < len(names):
        raise UserError(f"{path} names a target twice")
    for target in targets:
        shape = target.get("shape")
        matrix = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int for size in shape)
        if not matrix or shape[1] != rank:
            raise UserError(
                f"{path}: {target['name']} has shape {shape!r} in the manifest, expected [outputs, {rank}]"
            )
        if not trained and (type(target.get("in_features")) is not int or target["in_features"] < 1):
            raise UserError(
                f"{path}: {target['name']} has in_features {target.get('in_features')!r} in the manifest,"
                " expected a width"
            )


def check_content(source: Source, manifest: dict[str, Any]) -> None:
    """Raise UserError unless the digest fits the manifest and the tensors, and no tensor is left over."""
    tensors = {target["name"]: source.tensors[target["name"]] for target in manifest["targets"]}
    if len(tensors) != len(source.tensors):
        raise UserError(
            f"{source.path} holds {next(name for name in source.tensors if name not in tensors)}, which its"
            " manifest does not list"
        )
    if digest(manifest, tensors) != manifest.get("content_version"):
        raise UserError(
            f"{source.path}: content_version is not the digest of the manifest and D; the package is damaged"
            " or was edited"
        )


def canonical(value: Any) -> str:
    """Write JSON as jsoncpp does without indentation.

    Keys are in order, numbers have 17 significant digits, and a dot where they are no integers.
    """
    if isinstance(value, dict):
        keys = sorted(value, key=str.encode)
        return "{" + ",".join(f"{json.dumps(key)}:{canonical(value[key])}" for key in keys) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, float):
        text = f"{value:.17g}"
        return text if "." in text or "e" in text else f"{text}.0"
    return json.dumps(value)


def digest(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Hash (SHA-256) the manifest without its digest, and the tensors' bytes in the manifest's order."""
    named = {field: value for field, value in manifest.items() if field != "content_version"}
    sha = hashlib.sha256(canonical(named).encode())
    for tensor in tensors.values():
        sha.update(memory(tensor.contiguous()))
    return sha.hexdigest()


def columns(adapter: Adapter) -> dict[str, Tensor]:
    """Return each linear's D (out, r) fp32, for which dW[o, i] = D[o, i mod r].

    Raises UserError for a MiSS of another layout.
    """
    options = adapter.options
    if other := beyond_plain(options, "scale", "mini_r"):
        raise UserError(f"rwkv_lightning's MiSS has no {other}; {WAY_OUT}")
    found = {}
    with torch.no_grad():
        for name, layer in adapted_layers(adapter):
            _, D = layer.low_rank()
            found[name] = options.at(name).shard_scale(layer.in_features) * D.contiguous()
    return found


def with_manifest(adapter: Adapter) -> tuple[Adapter, dict[str, Any]]:
    """Return (the adapter with its widths, the manifest without its digest).

    The manifest is the original one if the adapter came from a package, else a new one with alpha = r. Raises
    UserError for a change that a package can't hold, and if the base is not known.
    """
    manifest = origin_of(adapter, "rwkv-lightning").get("manifest")
    check_linears(adapter)
    if not adapter.base and not manifest:
        raise UserError(
            "rwkv_lightning loads an adapter only onto the model whose SHA-256 the package names; give that"
            " file: --base MODEL.pth"
        )
    if os.path.isdir(adapter.base):
        raise UserError(
            f"--base {adapter.base} is a folder, and rwkv_lightning's package names the SHA-256 of a model's"
            " file; make that with python -m scripts.export --to pth, and give it as --base"
        )
    base = sha256(adapter.base) if adapter.base else manifest.get("base_fingerprint")
    if manifest and base != manifest.get("base_fingerprint"):
        raise UserError(
            f"--base {adapter.base} is another model than the package's: its SHA-256 is {base}, not"
            f" {manifest.get('base_fingerprint')}"
        )
    if manifest:
        return with_widths(adapter, manifest), dict(manifest)
    return adapter, new_manifest(adapter, base)


def with_widths(adapter: Adapter, known: dict[str, Any]) -> Adapter:
    """Give the adapter the widths of its original manifest. Raises UserError if they do not fit."""
    check_manifest("the adapter's origin", known, False)
    linears = {f"{name}.weight.D" for name in adapter.metadata["linears"]}
    if {target["name"] for target in known["targets"]} != linears:
        raise UserError(
            "the adapter's origin names other linears than the adapter changes; the file is damaged"
        )
    shapes = {}
    for target in known["targets"]:
        shapes[target["name"].removesuffix(".weight.D")] = target["shape"][0], target["in_features"]
    return dataclasses.replace(adapter, shapes=shapes)


def new_manifest(adapter: Adapter, base: str) -> dict[str, Any]:
    """Build a manifest with alpha = r; base: the model's SHA-256. Raises UserError for several ranks, or a
    large one."""
    ranks = sorted({options.rank for options in adapter.options_by_linear().values()})
    if len(ranks) > 1 or ranks[0] > LARGEST_RANK:
        listed = ", ".join(map(str, ranks))
        raise UserError(
            f"rwkv_lightning has one rank for all linears, up to {LARGEST_RANK}; this adapter has {listed};"
            f" {WAY_OUT}"
        )
    targets = []
    for name, (out, width) in sorted(linear_shapes(adapter).items(), key=lambda item: place(item[0])):
        layer, target = place(name)
        targets.append(
            {
                "name": f"{name}.weight.D",
                "layer": layer,
                "target": f"{TARGETS[target]}.weight",
                "in_features": width,
                "shape": [out, ranks[0]],
            }
        )
    return {
        **FIXED,
        "dtype": "float16",
        "rank": ranks[0],
        "alpha": float(ranks[0]),
        "scale": 1.0,
        "base_fingerprint": base,
        "targets": targets,
    }


def check_linears(adapter: Adapter) -> None:
    """Raise UserError for a change that a package cannot hold."""
    linears, method = set(adapter.metadata["linears"]), adapter.metadata["method"]
    if method != "miss":
        raise UserError(f"rwkv_lightning has MiSS only, this adapter is {method}; {WAY_OUT}")
    if (adapter.metadata.get("arch") or {}).get("version", 7) != 7:
        raise UserError(f"rwkv_lightning runs RWKV-7, and this adapter belongs to RWKV-6; {WAY_OUT}")
    for name in sorted(linears) or ["no linear"]:
        if not re.fullmatch(rf"blocks\.\d{{1,3}}\.({'|'.join(map(re.escape, TARGETS))})", name):
            raise UserError(
                f"rwkv_lightning adapts {', '.join(TARGETS)}, and this adapter changes {name}; {WAY_OUT}"
            )
    for name in adapter.tensors:
        if name.rpartition(".")[0] not in linears:
            raise UserError(
                f"rwkv_lightning keeps changes of linears only, and {name} is trained as a whole; {WAY_OUT}"
            )


def place(name: str) -> tuple[int, int]:
    """Return (number of the block, place in TARGETS) of a linear."""
    _, layer, *target = name.split(".")
    return int(layer), TARGETS.index(".".join(target))
