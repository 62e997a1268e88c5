"""RWKV-6 and RWKV-7: one class for training, long context and chat, `logits, state = model(ids, state)`.

Shapes: B batch, T tokens, C n_embd, A dim_att = H heads x N head_size, F dim_ffn, V vocabulary.
Parameter names are the checkpoint's. rwkv6.py and rwkv7.py have the differences between the versions.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_miss.adapter_file import ADAPTER_FORMAT, read_described
from rwkv_miss.errors import UserError, listed
from rwkv_miss.files.checkpoint import Arch, check_finite, refuse_run_checkpoint
from rwkv_miss.files.identity import Identity
from rwkv_miss.files.model_files import forget_readings, name_of
from rwkv_miss.progress import Progress, progress
from rwkv_miss.quantised import quantise_
from rwkv_miss.targets import layer_number

from ..common.first_process import is_first_process
from ..common.token_loss import loss_sum
from ..ops import nothing_saved
from ..ops.elementwise import native_functions
from . import rwkv6, rwkv7
from .layers import Embedding, Head, LayerNorm, chosen
from .loss import LOGITS_AT_ONCE, LogitLoss, top_of

VERSIONS = {6: rwkv6, 7: rwkv7}


class LayerState(NamedTuple):
    """State of a layer between two tokens."""

    att_x: Tensor  # (B, C), the last input of the time mix, after ln1
    wkv: Tensor | None  # (B, H, N, N) fp32, v6 [key, value], v7 [value, key]; None: the initial state
    ffn_x: Tensor  # (B, C), the last input of the channel mix, after ln2


State = list[LayerState]


def default_arch(
    version: int, n_layer: int, n_embd: int, vocab_size: int = 65536, head_size: int = 64
) -> Arch:
    """Return RWKV-LM's sizes for a model of `n_layer` layers and `n_embd` channels."""
    dim_ffn, ranks = VERSIONS[version].default_sizes(n_embd)
    return Arch(
        version,
        vocab_size,
        n_embd,
        n_layer,
        n_embd // head_size,
        head_size,
        n_embd,
        dim_ffn,
        ranks,
        layer0_value_residual=version == 7,
    )


def recomputed(function: Callable, *arguments):
    """Call function(*arguments), keep nothing for the backward, and run it again there.

    torch's check of both runs is off: the first one skips the tensors that only a backward of WKV reads.
    """
    return checkpoint(
        function,
        *arguments,
        use_reentrant=False,
        context_fn=lambda: (nothing_saved(), contextlib.nullcontext()),
        determinism_check="none",
    )


class Block(nn.Module):
    """One layer: x += time mix(ln1(x)); x += channel mix(ln2(x)).

    The first one also normalises the embedding (ln0). The channel mix's output is returned apart from x: the
    next norm adds the two, which a GPU does in one kernel.
    """

    def __init__(self, arch: Arch, layer: int, kernel: str):
        super().__init__()
        version = VERSIONS[arch.version]
        if layer == 0:
            self.ln0 = LayerNorm(arch.n_embd, kernel)
        self.ln1 = LayerNorm(arch.n_embd, kernel)
        self.ln2 = LayerNorm(arch.n_embd, kernel)
        self.att = version.TimeMix(arch, layer, kernel)
        self.ffn = version.ChannelMix(arch, layer, kernel)

    def forward(
        self,
        x: Tensor,
        mixed: Tensor | None,
        v_first: Tensor | None,
        state: LayerState,
        reset: Tensor | None,
        wanted: Tensor | None = None,
        recompute: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, LayerState]:
        """Return x and a term to be added to it, both (B, T, C), v_first and the state after the layer.

        The input is x + mixed, or x where mixed is None. v_first (B, T, A) is layer 0's value in v7, None
        before layer 0 and in v6. With `wanted` (n,) int64 the channel mix is computed for these tokens only,
        and the new x and mixed are theirs, (n, C); the state is whole. With `recompute` the backward keeps
        only the inputs of the time mix.
        """
        if hasattr(self, "ln0"):
            _, x = self.ln0(x)
        # the norm runs where its token shift is: a GPU does both in one kernel
        run = functools.partial(recomputed, self.att) if recompute else self.att
        x, mixed, v_first, att_x, wkv = run(x, mixed, self.ln1, v_first, state.att_x, state.wkv, reset)
        x, mixed, ffn_x = self.ffn(x, mixed, self.ln2, state.ffn_x, reset, wanted)
        return chosen(x, wanted), mixed, v_first, LayerState(att_x, wkv, ffn_x)


class RWKV(nn.Module):
    """Language model, RWKV-6 or RWKV-7.

    `arch` gives version and sizes, `kernel` names the WKV implementation (see src.ops). `RWKV(arch)` has
    RWKV-LM's from-scratch initialisation; `RWKV.load(path)` reads a checkpoint.
    """

    def __init__(self, arch: Arch, kernel: str = "torch"):
        super().__init__()
        self.arch = arch
        self.grad_cp = 0  # recomputed in the backward: 0 nothing, 1 whole layers, 2 their time mixes
        self.computes_in: torch.dtype | None = None  # dtype of the activations, if the linears have another
        self.base_name: str | None = None
        self.base_identity: Identity | None = None
        self.start_fingerprint: str | None = None  # digest of the adapter that a training begins with
        self.emb = Embedding(arch.vocab_size, arch.n_embd)
        self.blocks = nn.ModuleList(Block(arch, layer, kernel) for layer in range(arch.n_layer))
        self.ln_out = LayerNorm(arch.n_embd, kernel)
        self.head = Head(arch.n_embd, arch.vocab_size, kernel)
        if not self.head.weight.is_meta:
            self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Initialise as RWKV-LM does: emb uniform +-1e-4, head orthogonal. Layers initialise themselves."""
        vocab, width = self.arch.vocab_size, self.arch.n_embd
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        nn.init.orthogonal_(self.head.weight, gain=0.5 * max(1.0, vocab / width) ** 0.5)

    @classmethod
    def load(cls, path, dtype: torch.dtype | None = None, device="cpu", kernel: str = "torch") -> RWKV:
        """Load the model of a file or a Hugging Face folder, in its dtypes or all in `dtype`.

        On the CPU without `dtype` it stays mapped: there is no copy. Raises UserError for a file that is no
        RWKV-6 or 7, lacks or adds tensors, or holds NaN.
        """
        tensors = read_model_file(path)
        forget_readings()
        arch = Arch.detect(tensors)
        with torch.device("meta"):
            model = cls(arch, kernel)
        model.check(tensors, path)

        def from_file(name: str, parameter: Tensor) -> Tensor:
            wanted = dtype or tensors[name].dtype
            if name.endswith(".time_state"):  # states are fp32 everywhere
                wanted = torch.promote_types(wanted, torch.float32)
            # one shape inside, whatever the file's; only tensors that a folder holds transposed are copied
            return tensors[name].reshape(parameter.shape).to(device=device, dtype=wanted).contiguous()

        with Progress("loading the model", shown=is_first_process()):
            check_finite(tensors)
            replace_tensors(model, from_file)
        model.base_name = name_of(path)
        model.base_identity = Identity(path, shown=is_first_process())
        model.base_identity.hash_small_file(tensors)
        return model

    @property
    def base_fingerprint(self) -> str | None:
        """Return the file's fingerprint, computed at the first call unless it is remembered."""
        return self.base_identity and self.base_identity.fingerprint

    def check(self, tensors: dict[str, Tensor], path) -> None:
        """Raise UserError unless these are exactly the model's tensors: floating point, with their shapes.

        Vectors may be squeezed, (C) for (1, 1, C), as some converters write them.
        """
        expected = {name: p.shape for name, p in self.named_parameters()}
        missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
        for kind, names in (("lacks", missing), ("has the unknown", extra)):
            if names:
                raise UserError(
                    f"{path} {kind} {listed(sorted(names), 5)}; expected exactly the tensors of"
                    f" {self.arch.describe()}"
                )
        for name, shape in expected.items():
            got = tensors[name].shape
            if not tensors[name].is_floating_point():
                raise UserError(
                    f"{path}: {name} is {tensors[name].dtype}, expected floating-point numbers; the codes of"
                    " a quantised model are no weights: give the model from before, with --quant int8 or nf4"
                )
            if [n for n in got if n != 1] != [n for n in shape if n != 1]:
                raise UserError(
                    f"{path}: {name} is {tuple(got)}, expected {tuple(shape)} in {self.arch.describe()}"
                )

    def set_kernel(self, kernel: str) -> None:
        """Use another WKV implementation, and the native functions for it (src.ops.elementwise)."""
        native = native_functions(kernel)
        for block in self.blocks:
            block.att.kernel = kernel
        for module in self.modules():
            if hasattr(module, "native"):
                module.native = native

    @property
    def kernel(self) -> str:
        """The WKV implementation."""
        return self.blocks[0].att.kernel

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the activations, to which every module casts its weights.

        The linears have it, while base tensors that are trained with an adapter are fp32. If the linears are
        trained, which is done in fp32, or are quantised, it is `computes_in`.
        """
        return self.computes_in or self._linear_weight().dtype

    def _linear_weight(self) -> Tensor:
        # not att.output.weight: ZeRO-3 would keep a parameter that is looked up by name outside of its layer
        # whole for the step
        return next(self.blocks[0].att.output.parameters())

    def layer_linears(self) -> dict[str, nn.Linear]:
        """Return the linears of all layers by name, adapted or not.

        They are most of the model: all but emb, head, low-rank maps and vectors.
        """
        return {
            f"blocks.{name}": module
            for name, module in self.blocks.named_modules()
            if isinstance(module, nn.Linear)
        }

    def first_trained(self) -> int:
        """Return the first layer that a gradient has to reach; n_layer if only what is above is trained."""
        names = [name for name, p in self.named_parameters() if p.requires_grad]
        below_head = [name for name in names if not name.startswith(("ln_out.", "head."))]
        return min([layer_number(name) or 0 for name in below_head], default=self.arch.n_layer)

    def quantise(self, kind: str, dtype: torch.dtype) -> None:
        """Hold the frozen layer_linears() in 8 or 4 bits, as rwkv_miss/quantised.py describes.

        Other frozen tensors are held in `dtype`, the dtype of the products. Mapped weights are read
        one after the other, so that no dense copy of the model is made.
        """
        linears = list(self.layer_linears().values())
        quantise_(progress(linears, f"quantising to {kind}", unit="matrices", shown=is_first_process()), kind)
        for name, p in self.named_parameters():
            is_state = name.endswith("time_state")  # states are fp32 everywhere
            if p.is_floating_point() and not p.requires_grad and not is_state:
                p.data = p.data.to(dtype)
        self.computes_in = dtype

    def initial_state(self, batch: int) -> State:
        """Return the state before the first token of `batch` rows: zeros.

        Its WKV states are None, since each layer has its own initial one.
        """
        zeros = self._linear_weight().new_zeros(batch, self.arch.n_embd, dtype=self.dtype)
        return [LayerState(zeros, None, zeros)] * self.arch.n_layer

    def features(
        self,
        ids: Tensor,
        state: State | None = None,
        reset: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Compute the input of the head (B, T, C) for ids (B, T) int64, and the state after the last token.

        Where `reset` (B, T) bool is set a document starts: nothing of the tokens before reaches it or the
        ones after. With `wanted` (n,) int64 the result is (n, C), for the tokens b T + t that it names, and
        the last layer does no more than they need. The activations have the dtype of the state,
        which is the model's unless the caller gives another.
        """
        if state is None:
            state = self.initial_state(len(ids))
        x, mixed, v_first, after = self.emb(ids).to(state[0].att_x.dtype), None, None, []
        for layer, (block, before) in enumerate(zip(self.blocks, state, strict=True), 1):
            of_these = wanted if layer == len(self.blocks) else None
            recompute = self.grad_cp if torch.is_grad_enabled() else 0
            if recompute and mixed is not None:
                x, mixed = x + mixed, None  # the backward keeps one input of the layer, not two
            if recompute == 1:
                x, mixed, v_first, new = recomputed(block, x, mixed, v_first, before, reset, of_these)
            else:
                x, mixed, v_first, new = block(x, mixed, v_first, before, reset, of_these, recompute == 2)
            after.append(new)
        _, x = self.ln_out(x, mixed)
        return x, after

    def forward(
        self, ids: Tensor, state: State | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Compute logits (B, T, V) for ids (B, T) int64, and the state after the last token.

        `reset` is that of features().
        """
        x, state = self.features(ids, state, reset)
        return self.head(x), state

    def loss(self, x: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sum the loss, as in loss.py, for x (tokens, C) from features() and targets (tokens,) int64.

        It never holds all logits. `weights` are (tokens,) fp32.
        """
        if isinstance(self.head, Head):
            return self.head(x, targets, weights)
        blocks = self._in_blocks(lambda x, *others: loss_sum(self.head(x), *others), x, targets, weights)
        return torch.stack(blocks).sum()

    def logit_sums(self, x: Tensor, targets: Tensor, weights: Tensor | None, logit_loss: LogitLoss) -> Tensor:
        """Compute the sums of a loss of all logits; all others are as for loss()."""
        if isinstance(self.head, Head):
            return self.head(x, targets, weights, logit_loss=logit_loss)

        def of_block(x: Tensor, targets: Tensor, numbers: Tensor, *weights: Tensor) -> Tensor:
            of_tokens = weights[0] if weights else None
            return logit_loss._replace(numbers=numbers).sums(self.head(x), targets, of_tokens)

        return torch.stack(self._in_blocks(of_block, x, targets, logit_loss.numbers, weights)).sum(0)

    def log_probs(self, x: Tensor, targets: Tensor) -> Tensor:
        """Compute ln p (tokens,), at least fp32, of targets (tokens,) int64 for x (tokens, C) from
        features().

        It never holds all logits.
        """
        if isinstance(self.head, Head):
            return self.head(x, targets, each=True)
        return torch.cat(self._in_blocks(self._log_probs_of, x, targets))

    def top_log_probs(self, x: Tensor, count: int, temperature: float) -> Tensor:
        """Compute top_of() of each token's logits, without gradient."""
        return torch.cat(self._in_blocks(lambda x: top_of(self.head(x), count, temperature), x.detach()))

    def _in_blocks(self, function: Callable[..., Tensor], *inputs: Tensor | None) -> list[Tensor]:
        """Call function(*inputs) for some tokens at a time; the backward computes it again.

        This is for an adapted head, which returns only logits.
        """
        at_once = max(1, LOGITS_AT_ONCE // self.arch.vocab_size)
        tensors = [x for x in inputs if x is not None]
        return [
            checkpoint(function, *part, use_reentrant=False)
            for part in zip(*(x.split(at_once) for x in tensors), strict=True)
        ]

    def _log_probs_of(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(x)
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -F.cross_entropy(exact, targets, reduction="none")

    def next_logits(
        self, ids: Tensor, state: State | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Compute logits (B, V) after the last token of ids (B, T) int64 only, and the state.

        Generation needs no others of a prompt. `reset` is that of features().
        """
        rows, length = ids.shape
        last = torch.arange(length - 1, rows * length, length, device=ids.device) if length > 1 else None
        x, state = self.features(ids, state, reset, wanted=last)
        return self.head(x.view(rows, -1)), state


def read_model_file(path) -> dict[str, Tensor]:
    """Read the tensors of a base or merged file, or of a Hugging Face folder.

    Raises UserError for an adapter, or the checkpoint of a run.
    """
    tensors, metadata = read_described(path, is_first_process())
    refuse_run_checkpoint(path, metadata)
    if metadata.get("format") == ADAPTER_FORMAT:
        base = metadata.get("base") or "which it does not name"
        raise UserError(
            f"{path} is an adapter; give its base ({base}) as the model, and this file as --adapter in chat"
            " and merge"
        )
    return tensors


def replace_tensors(module: nn.Module, values: Callable[[str, Tensor], Tensor]) -> None:
    """Replace every parameter and buffer of a module by values(name, tensor).

    A tensor that several layers share stays shared.
    """
    new: dict[int, Tensor] = {}
    for name, old in [*module.named_parameters(), *module.named_buffers()]:
        tensor = values(name, old)
        if isinstance(old, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
        new[id(old)] = tensor
    for owner in module.modules():
        # they keep their order and the names registered for them
        for slots in (owner._parameters, owner._buffers):
            slots.update({leaf: new[id(old)] for leaf, old in slots.items() if old is not None})
