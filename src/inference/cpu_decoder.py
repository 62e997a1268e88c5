"""One token after another on the CPU: a `Decoder` runs each single token in one native call.

The native code is cuda/decode_cpu.cpp. A decoder is called as the model is, `logits, state =
decoder.next_logits(ids, state)`, and its states are the model's. So a prompt is read with matrix products,
and the answer is written by the native code.

Weights in fp32 and bf16 are the model's, without a copy; int8 ones are the decoder's own. What an adapter
(adapters.py) adds is computed beside them, in fp32. Activations and states of single tokens are fp32. So bf16
weights, as released files have them, give what fp32 ones do. A longer prompt is read in bf16 where the
weights are bf16 and the CPU multiplies in it.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_miss.adapter import adapted_linears
from rwkv_miss.errors import UserError

from .. import ops
from ..common.device import multiplies_bf16
from ..model import RWKV, LayerState, State
from ..ops import native, self_test
from .adapters import LowRank

MODEL = (
    "emb.weight",
    "blocks.0.ln0.weight",
    "blocks.0.ln0.bias",
    "ln_out.weight",
    "ln_out.bias",
    "head.weight",
)
NORMS = ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias", "att.ln_x.weight", "att.ln_x.bias")
# the members of Layer6 and Layer7 of cuda/decode_cpu.cpp
LAYER = {
    6: (
        *NORMS,
        *(f"att.time_maa_{name}" for name in "xwkvrg"),
        "att.time_decay",
        "att.time_faaaa",
        "ffn.time_maa_k",
        "ffn.time_maa_r",
        "att.time_maa_w1",
        "att.time_maa_w2",
        "att.time_decay_w1",
        "att.time_decay_w2",
        *(f"att.{name}.weight" for name in ("receptance", "key", "value", "gate", "output")),
        *(f"ffn.{name}.weight" for name in ("key", "receptance", "value")),
    ),
    7: (
        *NORMS,
        *(f"att.x_{name}" for name in "rwkvag"),
        *(f"att.{name}" for name in ("k_k", "k_a", "r_k", "w0", "a0", "v0")),
        "ffn.x_k",
        *(f"att.{name}{i}" for name in "wavg" for i in (1, 2)),
        *(f"att.{name}.weight" for name in ("receptance", "key", "value", "output")),
        "ffn.key.weight",
        "ffn.value.weight",
    ),
}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
ADVICE = "; the file may be damaged, or an adapter's scale too large"
LANES = 16  # vectors are padded to a multiple of this, a whole number of any CPU's SIMD lanes


class Matrix(ctypes.Structure):
    """Matrix of cuda/decode_cpu.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "type", "rank")),
        *((name, ctypes.c_void_p) for name in ("A", "B", "inner")),
        ("strength", ctypes.c_double),
    ]


class Int8Rows(NamedTuple):
    """weight (out, in) = values (out, in) int8 * scale (out,) fp32."""

    values: Tensor
    scale: Tensor


def int8_rows(weight: Tensor) -> Int8Rows:
    """Symmetric int8 with one scale for each row: the row's largest magnitude / 127.

    rwkv_miss/quantised.py has a scale for each 64 weights.
    """
    weight = weight.float()
    scale = weight.abs().amax(1) / 127
    return Int8Rows((weight / scale.clamp(min=1e-30).unsqueeze(1)).round_().to(torch.int8), scale)


class Decoder:
    """A model that reads prompts as before, and runs single tokens in the native code.

    `int8`: single tokens use the large matrices quantised. It works on one token at a time, with as many
    threads as torch has. Some of the model's matrices are shared with it. Others, and all vectors, are copies
    that are made here. So when the model gets other tensors, as from Adapters.use, refresh() must be called.
    Raises ValueError where problem() finds one.
    """

    def __init__(self, model: RWKV, int8: bool = False):
        if found := problem(model):
            raise ValueError(f"no decoder for this model: {found}")
        self.model, self.int8, self.threads = model, int8, torch.get_num_threads()
        arch = self.arch = model.arch
        self.state_shapes = LayerState(
            (1, arch.n_embd), (1, arch.n_head, arch.head_size, arch.head_size), (1, arch.n_embd)
        )
        self.names = [
            *MODEL,
            *(f"blocks.{i}.{name}" for i in range(arch.n_layer) for name in LAYER[arch.version]),
        ]
        self.sources = [self._source(name) for name in self.names]
        # the tensors that the native code points to, of the model and of adapters
        self.kept: dict[str, list[Tensor]] = {}
        self.beside: dict[str, list[Tensor]] = {}
        self.matrices: list[Matrix] = []
        for name, (tensor, low_rank) in zip(self.names, self.sources, strict=True):
            matrix = self._matrix(name, tensor)
            self._put_beside(name, matrix, low_rank)
            self.matrices.append(matrix)
        library = native.library("cpu")
        self.handle = self._open(library)
        self.fresh = True
        self.run, self.replace = library.decode_step, library.decode_replace
        self.close_native = library.decode_close

    def _open(self, library: ctypes.CDLL) -> ctypes.c_void_p:
        """What the native code knows the model by."""
        arch = self.arch
        sizes = (
            arch.n_layer,
            arch.n_embd,
            arch.dim_att,
            arch.n_head,
            arch.head_size,
            arch.dim_ffn,
            arch.vocab_size,
        )
        library.decode_open.restype = ctypes.c_void_p
        handle = library.decode_open(
            ctypes.c_int64(arch.version),
            (ctypes.c_int64 * len(sizes))(*sizes),
            (Matrix * len(self.names))(*self.matrices),
            ctypes.c_int64(len(self.names)),
            ctypes.c_int64(self.threads),
        )
        if not handle:
            raise RuntimeError(
                f"decode_open takes no {len(self.names)} matrices for {arch.describe()}: LAYER is not that of"
                " cuda/decode_cpu.cpp"
            )
        return ctypes.c_void_p(handle)

    @property
    def reading(self) -> torch.dtype:
        """The dtype of a prompt's activations."""
        in_bf16 = self.model.dtype == torch.bfloat16 and multiplies_bf16()
        return torch.bfloat16 if in_bf16 else torch.float32

    def refresh(self) -> None:
        """Take over those of the model's tensors that changed; what stayed the same costs nothing."""
        self._check_open()
        # where this is interrupted, it is done again before the next token
        self.fresh = False
        for place, (name, before) in enumerate(zip(self.names, self.sources, strict=True)):
            tensor, low_rank = self._source(name)
            if tensor is before[0] and low_rank is before[1]:
                continue
            matrix = self.matrices[place] if tensor is before[0] else self._matrix(name, tensor)
            self._put_beside(name, matrix, low_rank)
            self.replace(self.handle, ctypes.c_int64(place), ctypes.byref(matrix))
            self.matrices[place], self.sources[place] = matrix, (tensor, low_rank)
        self.fresh = True

    @property
    def emb(self):
        return self.model.emb

    def close(self) -> None:
        """End the threads."""
        if self.handle:
            self.close_native(self.handle)
            self.handle = None

    def __del__(self):
        if getattr(self, "handle", None):
            self.close()

    def _source(self, name: str) -> tuple[Tensor | None, LowRank | None]:
        """The model's parameter of that name, and what an adapter adds to it."""
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        return getattr(module, leaf, None), getattr(module, "low_rank", None) if leaf == "weight" else None

    def _matrix(self, name: str, tensor: Tensor | None) -> Matrix:
        """A parameter as the native code reads it; all zero where the model has none of that name."""
        if tensor is None:
            return Matrix()
        leaf = name.rpartition(".")[2]
        tensor, scale = tensor.detach(), None
        tensor = tensor if leaf == "weight" else tensor.squeeze()
        if leaf in ("time_faaaa", "r_k") or tensor.dim() < 2:
            rows, columns = 1, tensor.numel()
            padded = torch.zeros(-(-columns // LANES) * LANES)
            padded[:columns] = tensor.flatten()
            tensor = padded
        else:
            rows, columns = tensor.numel() // tensor.shape[-1], tensor.shape[-1]
            if self.int8 and leaf == "weight" and name != "emb.weight":
                tensor, scale = int8_rows(tensor)
            tensor = (tensor if tensor.dtype in TYPES else tensor.float()).contiguous()
        self.kept[name] = [tensor] if scale is None else [tensor, scale]
        return Matrix(
            tensor.data_ptr(), None if scale is None else scale.data_ptr(), rows, columns, TYPES[tensor.dtype]
        )

    def _put_beside(self, name: str, matrix: Matrix, low_rank: LowRank | None) -> None:
        """What an adapter adds to a matrix, or nothing."""
        if low_rank is None:
            matrix.rank, self.beside[name] = 0, []
            return
        A, B, matrix.strength = low_rank
        matrix.rank = B.shape[1]
        inner = torch.empty(matrix.rank)
        matrix.A, matrix.B, matrix.inner = None if A is None else A.data_ptr(), B.data_ptr(), inner.data_ptr()
        self.beside[name] = [B, inner] if A is None else [B, inner, A]

    @torch.no_grad()
    def next_logits(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """ids (1, T) int64 -> logits (1, V) fp32 after the last token, and the state after it.

        The given state stays as it is. Raises ValueError for other shapes and after close(), UserError where
        logits are not finite, IndexError for a token that is not in the vocabulary.
        """
        if state is None:
            state = self.model.initial_state(1)
        self._check(ids, state)
        if not self.fresh:
            self.refresh()
        if ids.shape[1] > 1:
            to = self.reading
            state = [layer._replace(att_x=layer.att_x.to(to), ffn_x=layer.ffn_x.to(to)) for layer in state]
            # the native code does the last token; of the others only the state is wanted
            prompt = ids[:, :-1]
            _, state = self.model.features(prompt, state, wanted=prompt.new_empty(0))
        return self._step(int(ids[0, -1]), state)

    def _check_open(self) -> None:
        if not self.handle:
            raise ValueError("the decoder is closed; make another one")

    def _check(self, ids: Tensor, state: State) -> None:
        self._check_open()
        if ids.dim() != 2 or len(ids) != 1 or not ids.numel():
            raise ValueError(
                f"ids are {tuple(ids.shape)}, expected (1, T): the decoder answers to one sequence of at"
                " least one token"
            )
        if len(state) != self.arch.n_layer:
            raise ValueError(
                f"the state has {len(state)} layers, expected {self.arch.n_layer} for {self.arch.describe()}"
            )
        for layer, parts in enumerate(state):
            for name, part, shape in zip(LayerState._fields, parts, self.state_shapes):
                if part is None and name == "wkv":
                    continue
                if part is None or part.shape != shape:
                    seen = None if part is None else tuple(part.shape)
                    raise ValueError(
                        f"{name} of layer {layer}'s state is {seen}, expected {shape} for"
                        f" {self.arch.describe()}"
                    )

    def _step(self, token: int, state: State) -> tuple[Tensor, State]:
        arch = self.arch
        if not 0 <= token < arch.vocab_size:
            raise IndexError(f"token {token} is not in the vocabulary of {arch.vocab_size}")
        before = [self._ready(part, layer) for layer, old in enumerate(state) for part in old]
        att_x, ffn_x = torch.empty(2, arch.n_layer, 1, arch.n_embd)
        wkv = torch.empty(arch.n_layer, 1, arch.n_head, arch.head_size, arch.head_size)
        after = [LayerState(*parts) for parts in zip(att_x.unbind(), wkv.unbind(), ffn_x.unbind())]
        logits = torch.empty(1, arch.vocab_size)
        pointers = ctypes.c_void_p * len(before)
        if self.run(
            self.handle,
            ctypes.c_int64(token),
            pointers(*[part.data_ptr() for part in before]),
            pointers(*[part.data_ptr() for layer in after for part in layer]),
            ctypes.c_void_p(logits.data_ptr()),
        ):
            raise UserError(f"the logits after token {token} are not finite: the model overflows{ADVICE}")
        return logits, after

    def _ready(self, part: Tensor | None, layer: int) -> Tensor:
        """A part of a state as the native code reads it; None is the WKV state that documents start from."""
        if part is None:
            part = self.model.blocks[layer].att.initial_state()
        if part is None:
            part = torch.zeros(self.arch.n_head, self.arch.head_size, self.arch.head_size)
        return part.to("cpu", torch.float32).contiguous()


def problem(model: RWKV) -> str:
    """Why the native code can't do this model's tokens; "" where it can."""
    if model.emb.weight.device.type != "cpu":
        return f"the model is on {model.emb.weight.device}"
    if (kernel := model.blocks[0].att.kernel) != "cpu":
        return f"the kernel is {kernel}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"the weights are {model.dtype}"
    if not next(model.blocks[0].att.output.parameters()).is_floating_point():
        return "its base is quantised"
    if adapted_linears(model):
        return "its adapter is one in training"
    return ops.head_size_problem(model.arch.head_size) or self_test.status("cpu").reason
