"""Model card, README.md of a run: the Hugging Face hub shows it if the user uploads the files.

It contains nothing about this machine: no paths, and only settings that describe the file.
"""

from __future__ import annotations

import os

import yaml

import rwkv_miss
from rwkv_miss.adapter import METHODS
from rwkv_miss.files import hub_names as hub
from rwkv_miss.files.checkpoint import Arch, read_checkpoint
from rwkv_miss.files.model_files import name_of
from rwkv_miss.targets import layers_text
from rwkv_miss.version import VERSION

from ..common.files import write_text
from ..common.formatting import markdown_table
from ..config import Settled
from ..data.formats.sources import names_dataset, weighted_paths
from ..losses import Loss, loss_of
from ..sources import source_of
from .curves import pictures
from .run_card import evaluations_table, training_score

README = "README.md"
WRITTEN = "<!-- A run writes this text anew at its end. Without this line it leaves your text alone. -->"


def write_model_card(
    config: Settled, summary: dict, metrics: list[dict], history: list[dict], file: str
) -> None:
    """Write README.md unless the user has one there. `file` is the run's recommendation."""
    path = os.path.join(config.proj_dir, README)
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as there:
            if WRITTEN not in there.read():
                return
    write_text(path, model_card(config, summary, metrics, history, file))


def model_card(config: Settled, summary: dict, metrics: list[dict], history: list[dict], file: str) -> str:
    """Write the text of README.md."""
    metadata = rwkv_miss.read_metadata(file) or {}
    described = metadata.get("arch")
    arch = Arch(**described) if described else Arch.detect(read_checkpoint(file))
    name, is_adapter = os.path.basename(file), config.peft != "none"
    head = _head(arch, config.peft, config.load_model, config.data_file)
    base = _base(config.load_model, metadata)
    parts = [
        f"---\n{yaml.safe_dump(head, allow_unicode=True, sort_keys=False)}---\n\n{WRITTEN}",
        f"# {os.path.basename(os.path.abspath(config.proj_dir))}",
        f"`{name}` is {_what(config.peft, config.load_model, base)}, written by rwkv-miss {VERSION}.",
        "## What was trained",
        markdown_table(["", ""], _trained(config, arch, base, metadata, metrics, summary)),
        "## What was measured",
        *_measured(loss_of(config), summary, history),
        *pictures(loss_of(config).metrics),
        "## How to use it",
        _usage(base, name, is_adapter),
    ]
    return "\n\n".join(parts) + "\n"


def _head(arch: Arch, peft: str, load_model: str, data_file: str) -> dict:
    """Make the YAML that the hub reads. Unknown facts are left out, also the license."""
    method = [peft] if peft != "none" else []
    head: dict = {
        "library_name": "rwkv-miss",
        "pipeline_tag": "text-generation",
        "tags": ["rwkv", f"rwkv{arch.version}", *method],
    }
    if base := _hub_name(load_model):
        head["base_model"] = base.repo
        head["base_model_relation"] = "adapter" if method else "finetune"
    if datasets := _datasets(data_file):
        head["datasets"] = datasets
    return head


def _hub_name(path: str) -> hub.HubName | None:
    """Return the name of a file from the hub."""
    return hub.parse(hub.recorded(path)) if hub.is_hub_name(hub.recorded(path)) else None


def _datasets(data_file: str) -> list[str]:
    """List OWNER/NAME of every data set of the hub, once."""
    names = {}
    for path, _ in weighted_paths(hub.recorded(data_file)):
        if hub.is_hub_name(path) and (name := hub.parse(path, hub.DATA)).repo_type == hub.DATA:
            names[name.repo] = None
        elif names_dataset(path):
            names["/".join(path.split("/")[:2])] = None
    return [*names]


def _base(load_model: str, metadata: dict) -> str:
    """Name the base: by the hub, else as the file records it, without its folder; "" for a new model."""
    if _hub_name(load_model):
        return hub.recorded(load_model)
    return metadata.get("base") or (name_of(load_model) if load_model else "")


def _what(peft: str, load_model: str, base: str) -> str:
    base = _code(base)
    if name := _hub_name(load_model):
        base = f"[{name.repo}](https://huggingface.co/{name.repo})"
    if peft == "none":
        return f"{base}, trained as a whole" if base else "a new model"
    return f"{METHODS[peft].about.title} for {base}"


def _trained(
    config: Settled, arch: Arch, base: str, metadata: dict, metrics: list[dict], summary: dict
) -> list[list[str]]:
    """Make the rows of the table about the training."""
    files = [_data_name(path, weight) for path, weight in weighted_paths(hub.recorded(config.data_file))]
    options = {name: value for name, value in (metadata.get("options") or {}).items() if value}
    template = metadata.get("template") or "rwkv"
    rows = {
        "model": arch.describe(),
        "base": _code(base),
        "digest of the base": _code(metadata.get("base_fingerprint")),
        "method": ", ".join([config.peft, *(f"{name} {value}" for name, value in options.items())])
        if config.peft != "none"
        else "full training",
        "layers with adapters": layers_text(config.adapted_layers(arch.n_layer)) if config.layers else "",
        "rows of tokens" if config.train_tokens else "whole tensors": config.train_parts
        + (f", of tokens {config.train_tokens}" if config.train_tokens else ""),
        "loss": source_of(config).description,
        "data": ", ".join(files),
        "tokens": f"{sum(line['tokens'] for line in metrics):,},"
        f" {sum(line['trained_tokens'] for line in metrics):,} of them trained",
        "steps": f"{summary['steps']:,}",
        "learning rate": f"{config.lr_init:.3g}, {config.lr_schedule}",
        "longest row": f"{config.ctx_len:,} tokens",
        "tokenizer": os.path.basename(metadata.get("tokenizer") or ""),
        "template": "a Jinja template, in the file" if "{" in template else template,
        "BOS": ", ".join(map(str, metadata.get("bos") or [])),
    }
    return [[name, value.replace("|", "\\|").replace("\n", " ")] for name, value in rows.items() if value]


def _code(text: str | None) -> str:
    return f"`{text.replace('`', '')}`" if text else ""


def _data_name(path: str, weight: float) -> str:
    """Name a data file without its folder on this machine."""
    shown = path if hub.is_hub_name(path) or names_dataset(path) else os.path.basename(path.rstrip("/\\"))
    return _code(shown) + (f" (weight {weight:g})" if weight != 1 else "")


def _measured(loss: Loss, summary: dict, history: list[dict]) -> list[str]:
    """Write the results of the training and of the held-out data, as in the run card."""
    described = loss.metrics
    rows = [[f"training {described.score}", training_score(described, summary)]]
    if moved := (summary.get("forgetting") or {}).get("all"):
        rows.append(["KL from the base per token, on a fixed text", f"{moved:.4f}"])
    parts = [markdown_table(["", ""], rows)]
    if history:
        parts += [f"On held-out {loss.words.example}s:", evaluations_table(described, history)]
    return parts


def _usage(base: str, name: str, is_adapter: bool) -> str:
    if not is_adapter:
        commands = [f"python -m demo.chat --model hf://OWNER/NAME/{name}"]
    else:
        commands = [
            f"python -m demo.chat --model {base} --adapter hf://OWNER/NAME/{name}",
            f"python -m rwkv_miss merge --base {base} --adapter hf://OWNER/NAME/{name} --out merged.pth",
            f"python -m rwkv_miss convert hf://OWNER/NAME/{name} FOLDER --to peft",
        ]
    text = (
        "With rwkv-miss, where OWNER/NAME is this repository. Prompts are written in the template that the"
        " file records."
    )
    return text + "\n\n" + "\n".join(["```bash", *commands, "```"])
