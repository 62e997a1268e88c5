"""Schema: every setting of a run.

One dataclass field is the flag, the YAML key, the help line and the row in the docs. RWKV-LM's and
RWKV-PEFT's names are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rwkv_miss.adapter import METHODS
from rwkv_miss.methods.token_rows import token_ids
from rwkv_miss.methods.whole_tensors import split_parts
from rwkv_miss.quantised import CODES
from rwkv_miss.targets import layer_numbers

from ..common.option import AUTO, opt
from .adapter_options import AdapterOptions
from .loss_settings import LossSettings

# RWKV-LM's usual rates; every adapter method has its own
FULL_LR, NEW_MODEL_LR = 1e-5, 6e-4
PUBLISHED = "the published rate of --peft"  # beginning of such a rate's reason
SCRIPT_NOTES = "script_notes.txt"  # in the run's folder: what the flags of another trainer's script mean
CHOSEN = "chosen"  # begins the origin of a setting that the program has chosen
PAPER = "paper"  # --lr_init paper, until the method is known


def _published_rates() -> str:
    rates = {name: METHODS[name].default_lr for name in sorted(METHODS)} | {
        "full": FULL_LR,
        "new model": NEW_MODEL_LR,
    }
    return ", ".join(f"{name} {rate:.0e}".replace("e-0", "e-") for name, rate in rates.items())


@dataclasses.dataclass(frozen=True)
class Config(LossSettings):
    """Settings of a training run, after those of the data and the loss."""

    peft: str = opt("miss", f"adapter method: {', '.join(sorted(METHODS))}; or none for full training")
    peft_config: dict = opt(
        {},
        "options of the method, as JSON or as key=value pairs: '{\"r\": 64}' or r=64,targets=key+value."
        " Empty: the method's own rank, 64 for most, at most width / 8",
        automatic=True,
    )
    train_parts: str = opt(
        "auto",
        "parts of the base model to train as whole tensors with the adapter, separated by commas:"
        " emb, head, ln (every norm), time (mixes, decay and bonus: RWKV-6 time_*; RWKV-7 x_*, w0-w2,"
        " a0-a2, v0-v2, k_k, k_a, r_k), state (the initial WKV state, as --peft state trains it)."
        " Empty: none. auto: emb,head with --train_tokens if the base never saw more than 1 % of the data's"
        " tokens, else none",
        automatic=True,
    )
    train_tokens: str = opt(
        "",
        "ids of tokens, such as 10,97-122: of emb and head in --train_parts only their rows are trained,"
        " which makes a small adapter that can be served together with others. Empty: all rows. --train_parts"
        " auto chooses the tokens that the base never saw",
    )
    layers: str = opt(
        "",
        "layers that get the adapter: last:6, first:6, numbers such as 0,3,11 or ranges such as 4-7. Below"
        " the lowest one a step keeps nothing and has no backward pass. Empty: all",
    )
    init_adapter: str = opt(
        "",
        "an adapter or initial state that the run begins with: a file of this project, one of RWKV-PEFT, or"
        " a folder of HF peft. It brings --peft, --peft_config, --train_parts and --layers; where one of them"
        " is given it must agree. Empty: a new adapter",
        file=True,
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
    n_layer: int = opt(0, "number of layers; read from the checkpoint", low=0)
    n_embd: int = opt(0, "width of the model; read from the checkpoint", low=0)
    vocab_size: int = opt(
        0, "size of the vocabulary; read from the checkpoint, in a new model from the tokenizer", low=0
    )
    dim_att: int = opt(0, "width of the time mix; read from the checkpoint, in a new model n_embd", low=0)
    dim_ffn: int = opt(
        0,
        "width of the channel mix; read from the checkpoint, in a new model 3.5 n_embd (x060) or 4"
        " n_embd (x070)",
        low=0,
    )
    head_size: int = opt(
        0, "size of a head; read from the checkpoint, in a new model 64", alias=("head_size_a",), low=0
    )

    ctx_len: int = opt(
        0,
        "longest row in tokens. A longer text becomes several rows, a longer conversation is cut, and"
        " the plan says how many. 0: the longest document's length, as a power of two from 256 to 4096;"
        " with --chunk_ctx also above 4096",
        automatic=True,
        low=0,
    )
    chunk_ctx: int = opt(
        0,
        "run rows in chunks of N tokens, with the exact gradient carried through the state. Memory"
        " holds one chunk, and one state per chunk; the price is one more forward pass. 0: run rows"
        " whole",
        low=0,
    )
    truncate_ctx: int = opt(
        0,
        "stop the gradient at every N tokens, while the state goes on. N is a multiple of"
        " --chunk_ctx. 0: the gradient is exact",
        low=0,
    )
    state_cp: bool = opt(
        False,
        "1: keep only every sqrt(n)-th state of a row of n chunks. This saves memory and costs one"
        " more forward pass. Needs --chunk_ctx",
    )
    packing: bool = opt(
        True,
        "1: short documents share rows of ctx_len tokens and do not see each other. 0: one document a row",
    )
    micro_bsz: int = opt(
        0,
        "rows in one forward pass of one device. 0: as many as fit the free memory, at most 8",
        alias=("batch_size",),
        automatic=True,
        low=0,
    )
    accumulate_grad_batches: int = opt(
        0,
        "forward passes in one optimizer step. 0: 1 if micro_bsz is given. Otherwise a step gets 8"
        " rows over all devices, or fewer if one pass would have fewer than 50 steps; with --loss grpo 16",
        automatic=True,
        low=0,
    )
    global_bsz: int = opt(
        0, "rows in one optimizer step over all devices; sets accumulate_grad_batches. 0: not used", low=0
    )
    epoch_count: int = opt(
        0,
        "number of epochs. 0: as many passes over the data as make about 600 steps, at least one; one pass"
        " if no evaluation tells what more of them do",
        alias=("epochs",),
        automatic=True,
        words={"auto": 0},
        low=0,
    )
    epoch_steps: int = opt(0, "optimizer steps in one epoch. 0: one pass over the data", low=0)

    lr_init: float = opt(
        0.0,
        "learning rate after the warm-up. auto: chosen by method, rank and widths. paper: the method's own"
        f" published rate ({_published_rates()})",
        alias=("learning_rate",),
        automatic=True,
        words={"auto": 0.0, "paper": PAPER},
        low=0,
        high=1e30,
    )
    state_lr: float = opt(
        0.0,
        "learning rate of an initial state that is trained with an adapter. 0: 1e-2. With --peft state use"
        " --lr_init",
        low=0,
        high=1e30,
    )
    lr_map: dict = opt(
        {},
        "factors of the learning rate by parts of the trained tensors' names: '{\"ffn\": 0.5,"
        ' "blocks.0": 2}\' or ffn=0.5,blocks.0=2. The longest part that matches counts. A tensor that'
        " layers share is named shared.NAME. Empty: none, but for parts that --train_parts auto chooses",
        automatic=True,
    )
    lr_final: float = opt(-1.0, "learning rate at the last step. -1: a tenth of lr_init", high=1e30)
    lr_schedule: str = opt(
        "auto",
        "how the learning rate goes from lr_init to lr_final: cos; linear; exp, by the same factor at"
        " every step; constant, which stays at lr_init; wsd, which stays and falls in a straight line over"
        " the last fifth; or plateau, which halves it at each evaluation that is no better than one"
        " before. auto: cos",
        choices=("auto", "cos", "linear", "exp", "constant", "wsd", "plateau"),
        automatic=True,
    )
    warmup_steps: int = opt(
        -1, "optimizer steps of linear warm-up. -1: 5 % of the run", automatic=True, low=-1
    )
    optimizer: str = opt(
        "adamw",
        "adamw, or adamw8bit: AdamW with moments of 8 bits, by bitsandbytes. They take 2 bytes for each"
        " trained number instead of 8; tensors of fewer than 4096 numbers keep 8",
        choices=("adamw", "adamw8bit"),
    )
    beta1: float = opt(0.9, "AdamW beta1", low=0, below=1)
    beta2: float = opt(0.99, "AdamW beta2", low=0, below=1)
    adam_eps: float = opt(1e-8, "AdamW epsilon", low=0, high=1e30)
    weight_decay: float = opt(0.0, "AdamW weight decay, on matrices only", low=0, high=1e30)
    grad_clip: float = opt(1.0, "clip gradients to this norm. 0: no clipping", low=0)
    grad_cp: int = opt(
        -1,
        "activation checkpointing: what the backward pass computes again instead of keeping it. 0:"
        " nothing. 2: the time mixes, which saves most of the memory and is a little slower. 1: whole"
        " layers, which takes the least memory and is slower. -1: 0, or if one row does not fit 2, then"
        " 1",
        automatic=True,
        words={"true": 1, "false": 0},
    )
    random_seed: int = opt(42, "seed of initialisation and data order", low=0, below=2**63)

    precision: str = opt(
        "auto",
        "dtype of the frozen base model: auto, fp32, bf16 or fp16. What is trained is always fp32",
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
        " base model too. deepspeed_stage_1_offload, _2_offload and _3_offload keep the optimizer in"
        " the CPU's memory, and under stage 3 the parameters too. auto: none for one process, else ddp",
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
        low=1,
    )
    num_nodes: int = opt(
        1, "number of machines. torchrun, deepspeed and srun set it by themselves", low=1, operator=True
    )
    wkv: str = opt(
        "auto", "WKV kernel: auto, cuda, cuda-exact, cpu, torch or reference", alias=("op",), automatic=True
    )

    eval_file: str = opt(
        "",
        "held-out data, in any format of --data_file. Its loss is measured before, during and after"
        " the training",
        file=True,
    )
    eval_split: float = opt(
        -1.0,
        "share of --data_file to hold out. 0: none. -1: 5 %, at least 10 and at most 100 documents; of fewer"
        " than 100 a tenth, at least 5; fewer than 20 are trained whole",
        automatic=True,
    )
    eval_docs: int = opt(
        0,
        "number of held-out documents to evaluate, chosen by a hash of their tokens. 0: as many as fit"
        " if all evaluations may take a tenth of the run, counted in tokens",
        automatic=True,
        low=0,
    )
    eval_steps: int = opt(
        -1,
        "evaluate every N optimizer steps, and keep the best state as best.pth, if it is better than"
        " the base model. 0: only before and after the training. -1: 0; but after each pass or about every"
        " 100 steps if several passes are chosen, and with --loss grpo up to 5 times, if all evaluations stay"
        " within a tenth of the run",
        automatic=True,
        low=-1,
    )
    eval_samples: int = opt(
        3,
        "number of greedy answers to held-out questions that every evaluation shows. Up to 40 are counted; 0:"
        " no question is asked",
        low=0,
    )
    early_stop: int = opt(
        -1,
        "end the training after N evaluations in a row that are not better than the best one, by a"
        " thousandth of the first loss; the one before the training counts. With nothing held out, 1: end it"
        " when the training loss of a pass is a hundredth of the first step's. 0 or -1: never",
        automatic=True,
        low=-1,
    )
    wandb: str = opt(
        "",
        "send the run to this project of Weights & Biases. TensorBoard needs no flag: it is used"
        " where it is installed",
        operator=True,
    )

    init_only: bool = opt(
        False,
        "1: write a new model to rwkv-init.pth in proj_dir and end. A later run takes it as --load_model",
        operator=True,
    )
    save_steps: int = opt(
        0,
        "save the adapter and a checkpoint every N steps. Each adapter also stays as adapter-step-N.pth;"
        " full training leaves only the checkpoint. -N: every N passes over the data. 0: only at the end",
    )
    save_total_limit: int = opt(
        1, "number of checkpoints to keep. An older one is removed when the new one is complete", low=1
    )
    rollback_steps: int = opt(
        20,
        "keep the trained tensors and the optimizer in memory every N steps, and go back to them when"
        " a loss or gradient is not finite. With --peft none the run goes back to its newest"
        " checkpoint. 0: stop instead",
        low=0,
    )
    spike_sigmas: float = opt(
        0.0,
        "also go back when a loss is this many robust standard deviations above the median of the"
        " last 50. 0: never. --loss grpo takes only 0",
        low=0,
    )
    verbose: bool = opt(
        False, "1: print the plan with all the details that run_card.md has, not only its 14 lines"
    )
    resume: str = opt(
        "none",
        "auto: go on from the newest checkpoint in proj_dir, if there is one. none: begin a new run; a folder"
        " that holds one is refused",
        choices=("none", "auto"),
        operator=True,
    )

    # setting that is not the default -> where it is from, or "chosen: " and why
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    # about a script of another trainer, for the file SCRIPT_NOTES
    script_notes: tuple[str, ...] = dataclasses.field(default=(), compare=False, repr=False)

    @property
    def adapter(self) -> AdapterOptions | None:
        """Adapter of --peft, --peft_config and --train_parts; None in full training."""
        if self.peft == "none":
            return None
        given, tokens = self.settled(), tuple(token_ids(self.train_tokens))
        return AdapterOptions.of(self.peft, given.peft_config, given.train_parts, self.layers, tokens)

    def adapted_layers(self, n_layer: int) -> list[int]:
        """List the layers that are trained, of a model with `n_layer`."""
        return sorted(layer_numbers(self.layers or f"first:{n_layer}", range(n_layer)))

    @property
    def published_rate(self) -> float:
        """Published learning rate of what is trained."""
        if self.peft != "none":
            return METHODS[self.peft].default_lr
        return FULL_LR if self.load_model else NEW_MODEL_LR

    @property
    def state_learning_rate(self) -> float | None:
        """Rate of an initial state that is trained with an adapter; None without one.

        An initial state that is trained alone has the rate lr_init.
        """
        if "state" not in split_parts(self.settled().train_parts):
            return None
        return self.state_lr or METHODS["state"].default_lr

    @property
    def world(self) -> int:
        """Processes on all machines."""
        return self.devices * self.num_nodes

    @property
    def accumulation(self) -> int:
        """Forward passes of one device in one optimizer step."""
        if self.global_bsz:
            return self.global_bsz // (self.micro_bsz * self.world)
        return self.settled().accumulate_grad_batches or 1

    @property
    def rows_per_step(self) -> int:
        """Rows of all processes in one optimizer step."""
        return self.micro_bsz * self.world * self.accumulation

    def total_steps(self, steps_per_pass: int) -> int:
        """Count the optimizer steps of the run, on data that have `steps_per_pass`."""
        return self.epoch_count * (self.epoch_steps or steps_per_pass)

    def is_automatic(self, name: str) -> bool:
        """Tell whether a setting is left to the program, which has not chosen it."""
        return FIELDS[name].metadata["automatic"] and getattr(self, name) == FIELDS[name].default

    def settled(self) -> Settled:
        """Return the settings without AUTO: one that is still left to the program is 0 or empty."""
        unused = {name: type_of(name)() for name in FIELDS if self.is_automatic(name)}
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(Config)}
        return Settled(**values | unused, unused=frozenset(unused))

    def written(self, name: str) -> Any:
        """Return the value as files and commands have it, where AUTO is a number or empty."""
        value = getattr(self, name)
        return FIELDS[name].metadata["written"] if value is AUTO else value

    def origin_of(self, name: str) -> str:
        """Tell where a value is from: "command line", "FILE.yaml", "preset NAME", a launcher, "default", or
        the reason why it was chosen.
        """
        is_default = self.written(name) == Config().written(name)
        return self.origins.get(name, "default" if is_default else "given")


@dataclasses.dataclass(frozen=True)
class Settled(Config):
    """Settings of a run, after all choices; none is AUTO.

    Nothing chooses a setting that the run does not use. It is 0 or empty here, and files have the word or
    number for a choice of the program.
    """

    unused: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if left := [name for name in FIELDS if getattr(self, name) is AUTO]:
            raise TypeError(f"{', '.join(left)}: AUTO is no value of a run; make Settled by Config.settled()")

    def is_automatic(self, name: str) -> bool:
        return name in self.unused

    def written(self, name: str) -> Any:
        return FIELDS[name].metadata["written"] if name in self.unused else getattr(self, name)


FIELDS = {f.name: f for f in dataclasses.fields(Config) if f.name not in ("origins", "script_notes")}
NAMES = {name: f.name for f in FIELDS.values() for name in (f.name, *f.metadata["alias"])}
# groups of settings: heading, subject, and the first setting; the others follow in the order of the dataclass
GROUPS = (
    ("Model, data and folder", "What a run reads, and where it writes.", "load_model"),
    ("Conversations", "How text becomes tokens, and which of them are trained.", "template"),
    ("Loss", "What is minimised: the cross entropy, that and a KL, or a preference.", "loss"),
    (
        "Rewards",
        "`--loss grpo` and in part `distill_on_policy`: the model learns from its own answers.",
        "group_size",
    ),
    ("Adapter", "What is trained. [methods.md](methods.md) compares the methods.", "peft"),
    ("Sizes of a new model", "Leave these out with `--load_model`: the file has them.", "version"),
    ("Rows and steps", "How much text one step sees. It decides most of the memory.", "ctx_len"),
    ("Learning rate and optimizer", "The optimizer is AdamW, with moments in fp32 or in 8 bits.", "lr_init"),
    ("Device and precision", "[scaling.md](scaling.md) is about several GPUs.", "precision"),
    ("Evaluation", "Held-out documents tell whether the model learns or memorises.", "eval_file"),
    ("Saving and going on", "[training.md](training.md) says what happens when a run stops.", "init_only"),
)
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


def type_of(name: str) -> type:
    return FIELDS[name].metadata["type"]


def read(name: str, value: Any) -> Any:
    """Return the value of a setting that files and commands write like this: written() undone."""
    meta = FIELDS[name].metadata
    return FIELDS[name].default if meta["automatic"] and value == meta["written"] else value


def uncommon_bounds(name: str) -> str:
    """Describe a number's bounds for help and docs; "" for "not negative", as nearly all are."""
    bounds = FIELDS[name].metadata["bounds"]
    has_high = bounds.high is not None and bounds.high < 1e30
    return bounds.text() if (bounds.low or 0) > 0 or bounds.below or has_high else ""
