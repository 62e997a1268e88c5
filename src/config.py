"""Every setting of a run: one dataclass field is the flag, the YAML key, the help line and the row in the
docs.

Order of precedence: command line, YAML file, preset, default. RWKV-LM's and RWKV-PEFT's names are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import math
import os
import shlex
from typing import Any

import yaml

from rwkv_miss.adapter import METHODS
from rwkv_miss.errors import Parser, UserError
from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.methods.whole_tensors import split_parts
from rwkv_miss.quantised import CODES

from . import legacy
from .common.files import is_first_process, write_text
from .processes import drop_local_rank, follow_launcher


def opt(
    default: Any,
    help: str,
    alias: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    automatic: bool = False,
) -> Any:
    """A setting with its help text, the names that neighbouring projects use for it, and its allowed values.

    `automatic`: the default is no value but leaves the choice to the program, which fills it in
    (src/choices.py).
    """
    meta = {"help": help, "alias": alias, "choices": choices, "automatic": automatic}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


# RWKV-LM's usual rates; every adapter method has its own
FULL_LR, NEW_MODEL_LR = 1e-5, 6e-4


def _own_rates() -> str:
    rates = {name: METHODS[name].default_lr for name in sorted(METHODS)} | {
        "full": FULL_LR,
        "new model": NEW_MODEL_LR,
    }
    return ", ".join(f"{name} {rate:.0e}".replace("e-0", "e-") for name, rate in rates.items())


@dataclasses.dataclass
class Config:
    """The settings of a training run."""

    load_model: str = opt(
        "", "the base .pth. Empty: a new model with the sizes of --version, --n_layer and --n_embd"
    )
    data_file: str = opt(
        "",
        "the training data: JSONL, JSON, CSV, TSV, parquet, .txt, binidx, a folder of such files, or"
        " OWNER/NAME of a Hugging Face data set. Several files with weights: a.jsonl:2,b.csv:0.5 reads"
        " every row of a.jsonl twice and half of b.csv",
    )
    sft_field: str = opt(
        "",
        "which columns to read, where a row fits several layouts: text, messages, question,answer or"
        " instruction,input,output",
    )
    sft_split: str = opt(
        "train",
        "which split to read of a Hugging Face data set, or of a folder whose files are named for splits",
    )
    on_bad_row: str = opt(
        "stop",
        "what to do with a row that cannot be used. stop: end with its file and line. skip: leave it"
        " out and count it",
        choices=("stop", "skip"),
    )
    proj_dir: str = opt(
        "out", "the run's folder, for adapter.pth, metrics.jsonl, config.yaml and checkpoints/"
    )
    tokenizer: str = opt(
        "auto",
        "auto, world, bytes, utf16, a tokenizer.json, or a vocabulary file in World format. auto: as"
        " --load_model records, else world for a model with the World vocabulary",
    )
    eod: str = opt("", "the text of the end-of-document token, where a tokenizer file does not name it")

    template: str = opt(
        "auto",
        "how conversations are written: rwkv, a mode of the G1 models (think, think-normal,"
        " think-short, think-long, fake-think), or a Jinja file with Hugging Face's conventions. auto:"
        " as --load_model records, else rwkv",
    )
    loss_mask: str = opt(
        "assistant",
        "which tokens are trained. assistant: the assistant's turns, completions, and plain text as a"
        " whole. all: everything. A marker such as Assistant: trains what follows it, up to the next"
        " turn. START...END trains what stands between the two. The end of a document is always"
        " trained",
    )
    data_cache: str = opt(
        "auto",
        "folder for tokenised data. auto: rwkv-miss/data in the user's cache folder. none: tokenise"
        " every time",
    )

    peft: str = opt("miss", f"adapter method: {', '.join(sorted(METHODS))}; or none for full training")
    peft_config: dict = opt(
        {},
        "options of the method, as JSON or as key=value pairs: '{\"r\": 64}' or r=64,targets=key+value."
        " Empty: the method's own rank, 64 for most, at most width / 8",
        automatic=True,
    )
    train_parts: str = opt(
        "",
        "parts of the base to train as whole tensors beside the adapter, separated by commas: emb,"
        " head, ln (every norm), time (mixes, decay and bonus: RWKV-6 time_*; RWKV-7 x_*, w0-w2,"
        " a0-a2, v0-v2, k_k, k_a, r_k), state (the initial WKV state, as --peft state trains it)."
        " Empty: none",
    )
    preset: str = opt(
        "",
        "settings of the MiSS paper: paper-table7 (7B and smaller) or paper-table8 (13B)",
        choices=("", "paper-table7", "paper-table8"),
    )

    version: str = opt(
        "",
        "x060 or x070, for a new model only; otherwise read from the checkpoint",
        alias=("my_testing",),
        choices=("", "x060", "x070"),
    )
    n_layer: int = opt(0, "number of layers; read from the checkpoint")
    n_embd: int = opt(0, "width; read from the checkpoint")
    vocab_size: int = opt(
        0, "size of the vocabulary; read from the checkpoint, in a new model from the tokenizer"
    )
    dim_att: int = opt(0, "width of the time mix; read from the checkpoint, in a new model n_embd")
    dim_ffn: int = opt(
        0,
        "width of the channel mix; read from the checkpoint, in a new model 3.5 n_embd (x060) or 4"
        " n_embd (x070)",
    )
    head_size: int = opt(
        0, "size of a head; read from the checkpoint, in a new model 64", alias=("head_size_a",)
    )

    ctx_len: int = opt(
        0,
        "longest row in tokens. A longer text becomes several rows, a longer conversation is cut, and"
        " the plan says how many. 0: the longest document's length, as a power of two from 256 to"
        " 4096; with --chunk_ctx without these bounds",
        automatic=True,
    )
    chunk_ctx: int = opt(
        0,
        "run rows in chunks of N tokens, with the exact gradient carried through the state. Memory"
        " holds one chunk, and one state per chunk; the price is one more forward pass. 0: run rows"
        " whole",
    )
    truncate_ctx: int = opt(
        0,
        "stop the gradient at every N tokens, while the state goes on. N is a multiple of"
        " --chunk_ctx. 0: the gradient is exact",
    )
    state_cp: bool = opt(
        False,
        "1: of n chunks keep only every sqrt(n)-th state. This saves memory and costs one more"
        " forward pass. Needs --chunk_ctx",
    )
    packing: bool = opt(
        True,
        "1: short documents share rows of ctx_len tokens and do not see each other. 0: a row is one document",
    )
    micro_bsz: int = opt(
        0,
        "rows in one forward pass of one device. 0: as many as fit the free memory, at most 8",
        alias=("batch_size",),
        automatic=True,
    )
    accumulate_grad_batches: int = opt(
        0,
        "forward passes in one optimizer step. 0: 1 where micro_bsz is given. Otherwise a step gets 8"
        " rows over all devices, or fewer where the run would have less than 50 steps",
        automatic=True,
    )
    global_bsz: int = opt(
        0, "rows in one optimizer step over all devices; sets accumulate_grad_batches. 0: not used"
    )
    epoch_count: int = opt(1, "number of epochs", alias=("epochs",))
    epoch_steps: int = opt(0, "optimizer steps in one epoch. 0: one pass over the data")

    lr_init: float = opt(
        0.0,
        f"learning rate after the warm-up. 0: the method's own ({_own_rates()})",
        alias=("learning_rate",),
        automatic=True,
    )
    state_lr: float = opt(
        0.0,
        "learning rate of the initial state beside an adapter. 0: its own, 1e-2. With --peft state"
        " use --lr_init",
    )
    lr_map: dict = opt(
        {},
        "factors of the learning rate by parts of the trained tensors' names: '{\"ffn\": 0.5,"
        ' "blocks.0": 2}\' or ffn=0.5,blocks.0=2. The longest part that fits counts. A tensor that'
        " layers share is named shared.NAME",
    )
    lr_final: float = opt(-1.0, "learning rate at the last step. -1: a tenth of lr_init")
    lr_schedule: str = opt(
        "cos",
        "cos, constant, or wsd: constant, then down to lr_final in a straight line over the last fifth",
        choices=("cos", "constant", "wsd"),
    )
    warmup_steps: int = opt(0, "optimizer steps of linear warm-up")
    beta1: float = opt(0.9, "AdamW beta1")
    beta2: float = opt(0.99, "AdamW beta2")
    adam_eps: float = opt(1e-8, "AdamW epsilon")
    weight_decay: float = opt(0.0, "AdamW weight decay, on matrices only")
    grad_clip: float = opt(1.0, "clip gradients to this norm. 0: no clipping")
    grad_cp: int = opt(
        -1,
        "activation checkpointing: what the backward pass computes again instead of keeping it. 0:"
        " nothing. 2: the time mixes, which saves most of the memory and is a little slower. 1: whole"
        " layers, which takes the least memory and is slower. -1: 0; if one row does not fit, 2, then"
        " 1",
        automatic=True,
    )
    random_seed: int = opt(42, "seed of initialisation and data order")

    precision: str = opt(
        "auto",
        "dtype of the frozen base: auto, fp32, bf16 or fp16. What is trained is always fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
        automatic=True,
    )
    quant: str = opt(
        "none",
        "none, int8 or nf4. int8 and nf4 keep the frozen matrices of the layers in 8.25 or 4.25 bits"
        " a weight. They are expanded to --precision for each product. The merge takes the unquantised"
        " --load_model",
        choices=("none", *CODES),
    )
    strategy: str = opt(
        "auto",
        "how several processes share the work: ddp, deepspeed_stage_1, _2 or _3; stage 3 splits the"
        " base too. deepspeed_stage_1_offload, _2_offload and _3_offload keep the optimizer in the"
        " CPU's memory, and under stage 3 the parameters too. auto: none for one process, else ddp",
        choices=(
            "auto",
            "ddp",
            *(f"deepspeed_stage_{stage}{offload}" for stage in "123" for offload in ("", "_offload")),
        ),
    )
    accelerator: str = opt("auto", "auto, cpu or gpu", choices=("auto", "cpu", "gpu"), automatic=True)
    devices: int = opt(
        1,
        "number of GPUs, or of CPU processes, on each machine. torchrun, deepspeed and srun set it by"
        " themselves",
    )
    num_nodes: int = opt(1, "number of machines. torchrun, deepspeed and srun set it by themselves")
    wkv: str = opt(
        "auto", "WKV kernel: auto, cuda, cuda-exact, cpu, torch or reference", alias=("op",), automatic=True
    )

    eval_file: str = opt(
        "",
        "held-out data, in any format of --data_file. Its loss is taken before, during and after the"
        " training",
    )
    eval_split: float = opt(
        -1.0,
        "share of --data_file to hold out. 0: none. -1: about 100 documents, at most 5 %; a smaller"
        " data set is trained whole",
        automatic=True,
    )
    eval_docs: int = opt(
        0,
        "number of held-out documents to evaluate, chosen by a hash of their tokens. 0: as many as"
        " keep all evaluations within a tenth of the run, counted in tokens",
        automatic=True,
    )
    eval_steps: int = opt(
        0,
        "evaluate every N optimizer steps, and keep the best state as best.pth. 0: only before and"
        " after the training",
    )
    eval_samples: int = opt(3, "number of held-out questions to answer, greedily, at every evaluation")
    early_stop: int = opt(
        0, "end the training after N evaluations in a row that are not better than the best one. 0: never"
    )
    wandb: str = opt(
        "",
        "send the run to this project of Weights & Biases. TensorBoard needs no flag: it is used"
        " where it is installed",
    )

    init_only: bool = opt(
        False,
        "1: write a new model to rwkv-init.pth in proj_dir and end. A later run takes it as --load_model",
    )
    save_steps: int = opt(0, "save the adapter and a checkpoint every N steps. 0: only at the end")
    save_total_limit: int = opt(
        1, "number of checkpoints to keep. An older one is removed when the new one is complete"
    )
    rollback_steps: int = opt(
        20,
        "keep the trained tensors and the optimizer in memory every N steps, and go back to them when"
        " a loss or gradient is not finite. With --peft none the run goes back to its newest"
        " checkpoint. 0: stop instead",
    )
    spike_sigmas: float = opt(
        0.0,
        "also go back when a loss is this many robust standard deviations above the median of the"
        " last 50. 0: never",
    )
    verbose: bool = opt(
        False, "1: print the plan with all the details that run_card.md has, not only its 14 lines"
    )
    resume: str = opt(
        "none",
        "auto: go on from the newest checkpoint in proj_dir, if there is one. none: start anew",
        choices=("none", "auto"),
    )

    @property
    def world(self) -> int:
        """Processes on all machines."""
        return self.devices * self.num_nodes


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
NAMES = {name: f.name for f in FIELDS.values() for name in (f.name, *f.metadata["alias"])}
# Tables 7 and 8 of arXiv 2409.15371: settings for 7B-class models and for 13B
_COMMON = {
    "lr_init": 2e-5,
    "lr_schedule": "cos",
    "warmup_steps": 0,
    "epoch_count": 1,
    "weight_decay": 0.0,
    "eval_split": 0.0,
}
_LORA36, _LORA64 = {"rank": 36, "alpha": 72.0}, {"rank": 64, "alpha": 128.0}
PRESETS = {
    "paper-table7": (
        {**_COMMON, "global_bsz": 64},
        {"miss": {"rank": 64}, "lora": _LORA36, "dora": _LORA36, "pissa": {"rank": 36, "alpha": 36.0}},
    ),
    "paper-table8": (
        {**_COMMON, "global_bsz": 128},
        {"miss": {"rank": 128}, "lora": _LORA64, "dora": _LORA64, "pissa": {"rank": 64, "alpha": 64.0}},
    ),
}


def parse(argv: list[str]) -> tuple[Config, dict[str, str]]:
    """Config from the command line, and where each value came from: "command line", "FILE.yaml", "preset
    NAME", a launcher, or "default".
    """
    config, origins = settle(
        read_flags(
            flag_parser("python train.py", "Fine-tune RWKV-6 and RWKV-7 checkpoints."), drop_local_rank(argv)
        )
    )
    follow_launcher(config, origins)
    validate(config)
    return config, origins


def flag_parser(prog: str, description: str) -> Parser:
    """A parser with a flag for every setting, to which a program may add its own."""
    parser = Parser(prog=prog, description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML with any of these settings; an earlier run's config.yaml is one",
    )
    for field in FIELDS.values():
        default = "" if field.default in ("", dataclasses.MISSING) else f" [{field.default}]"
        names = [f"--{name}" for name in (field.name, *field.metadata["alias"])]
        help = (field.metadata["help"] + default).replace("%", "%%")
        alone = {"nargs": "?", "const": "1"} if _kind(field.name) is bool else {}  # --verbose is --verbose 1
        parser.add_argument(*names, dest=field.name, metavar=_kind(field.name).__name__, help=help, **alone)
    return parser


def read_flags(parser: Parser, argv: list[str]) -> dict[str, Any]:
    """What a command line gives, by name, with older spellings translated and the user told."""
    argv, notes = legacy.translate(argv)
    for note in notes if is_first_process() else ():
        print("note:", note)
    return vars(parser.parse_args(argv))


def settle(given: dict[str, Any]) -> tuple[Config, dict[str, str]]:
    """parse() of flags that are read already, `config` among them, without validate()."""
    file = given.get("config")
    layers = [("command line", {name: value for name, value in given.items() if name != "config"})]
    if file:
        layers.append((file, read_yaml(file)))
    values, origins = _merge(layers)
    if values.get("preset"):
        values, origins = _merge([*layers, (f"preset {values['preset']}", _preset_values(values))])
    return Config(**values), {name: origins.get(name, "default") for name in FIELDS}


def read_yaml(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        inside = os.path.join(path, "config.yaml")
        raise UserError(
            f"config file {path} "
            + (
                f"is a folder; give {inside if os.path.isfile(inside) else 'a file'}"
                if os.path.isdir(path)
                else "does not exist"
            )
        )
    with open(path, "rb") as file:
        try:
            values = yaml.safe_load(file) or {}
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `name: value` lines, got {type(values).__name__}")
    for name in values:
        if name not in NAMES:
            near = difflib.get_close_matches(str(name), NAMES, 1)
            raise UserError(
                f"{path}: unknown setting {name!r}" + (f"; did you mean {near[0]}?" if near else "")
            )
    return values


def _merge(layers: list[tuple[str, dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Values in order of precedence, converted to their types, and their origins."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        for name, value in layer.items():
            if NAMES[name] not in values:
                try:
                    values[NAMES[name]] = _convert(NAMES[name], value)
                except UserError as error:
                    raise error if origin == "command line" else UserError(f"{origin}: {error}") from None
                origins[NAMES[name]] = origin
    return values, origins


def _preset_values(values: dict[str, Any]) -> dict[str, Any]:
    common, by_method = PRESETS[values["preset"]]
    method = values.get("peft", Config.peft)
    if method not in by_method:
        raise UserError(
            f"preset {values['preset']} has settings for {', '.join(by_method)}, not for --peft {method}"
        )
    return {**common, "peft_config": by_method[method]}


def _kind(name: str) -> type:
    default = FIELDS[name].default
    return dict if default is dataclasses.MISSING else type(default)


def _convert(name: str, value: Any) -> Any:
    """A flag's text or a YAML value in the field's own type."""
    kind = _kind(name)
    if kind is dict:
        return _parse_options(name, value)
    try:
        if value is None or isinstance(value, (dict, list)):
            raise ValueError
        if kind is bool:
            value = {"1": True, "true": True, "0": False, "false": False}[str(value).lower()]
        elif kind is str:
            value = str(value)
        else:
            # two of --grad_cp's values are these
            value = _number({"true": "1", "false": "0"}.get(str(value).lower(), str(value)), kind)
    except (ValueError, KeyError):
        raise UserError(f"--{name} {value}: expected {'0 or 1' if kind is bool else kind.__name__}") from None
    if name == "peft":
        value = legacy.METHOD_ALIASES.get(value, value)
    choices = (*sorted(METHODS), "none") if name == "peft" else FIELDS[name].metadata["choices"]
    if choices and value not in choices:
        raise UserError(f"--{name} {value}: expected one of {', '.join(c for c in choices if c)}")
    return value


def _number(text: str, kind: type) -> int | float:
    """1e3 is an int, too. A ValueError for what is no finite number of this kind."""
    if kind is int:
        with contextlib.suppress(ValueError):
            return int(text)  # with all its digits, which a float would not keep
    number = float(text)
    if not math.isfinite(number) or kind(number) != number:
        raise ValueError
    return kind(number)


def _parse_options(name: str, value: Any) -> dict[str, Any]:
    """{"r": 64} as a mapping, as JSON, or as r=64,alpha=32."""
    if isinstance(value, dict):
        return {str(name): given for name, given in value.items()}
    text = str(value).strip()
    if text.startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"--{name} {text}: not valid JSON ({error.msg} at column {error.colno})"
            ) from None
    options: dict[str, Any] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        key, sign, raw = pair.partition("=")
        if not sign:
            raise UserError(f"--{name} {text}: expected JSON or key=value pairs, got {pair!r}")
        if key in options:
            raise UserError(f"--{name} {text}: {key} is given twice; keep one")
        options[key] = raw.split("+") if key in TARGET_NAMES else _number_or_text(raw)
    return options


def _number_or_text(text: str) -> Any:
    try:
        return json.loads({"True": "true", "False": "false"}.get(text, text))
    except json.JSONDecodeError:
        return text


TARGET_NAMES = ("targets", "target_modules")


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
        if _kind(name) is int and name != "random_seed" and getattr(config, name) >= 2**31:
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


def is_automatic(config: Config, name: str) -> bool:
    """Whether the choice of a setting is left to the program, and has not been made yet."""
    return FIELDS[name].metadata["automatic"] and getattr(config, name) == getattr(Config(), name)


def accumulation(config: Config) -> int:
    """Forward passes of one device in one optimizer step."""
    if config.global_bsz:
        return config.global_bsz // (config.micro_bsz * config.world)
    return config.accumulate_grad_batches or 1


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


def save(config: Config, origins: dict[str, str], path: str) -> None:
    """Write the resolved settings as YAML, each with its origin; the file works as --config."""
    lines = [
        f"{yaml.safe_dump({name: getattr(config, name)}, default_flow_style=True, width=10**6).strip()[1:-1]}"
        f"  # {origin}"
        for name, origin in origins.items()
    ]
    write_text(path, "\n".join(lines) + "\n")


def command(config: Config) -> str:
    """The command that does this run again from its beginning: every setting that is not the default."""
    words = ["python", "train.py"]
    default = Config()
    for name in FIELDS:
        value = getattr(config, name)
        if name != "resume" and value != getattr(default, name):
            text = (
                json.dumps(value)
                if isinstance(value, dict)
                else str(int(value))
                if isinstance(value, bool)
                else str(value)
            )
            # what begins like a flag is none
            words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return shlex.join(words)
