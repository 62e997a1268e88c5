"""CPU decoder: one native call computes the next token of each row.

The native code is cuda/decode_cpu.cpp. Weights are read once for all rows. A row's results have the same bits
whatever the other rows are, and whatever the number of threads is. A prompt is read with matrix products.

Weights in fp32 and bf16 are the model's, without a copy; int8 ones are the decoder's own. An adapter's
change (adapters.py) is added in fp32. Activations and states of single tokens are fp32. So bf16
weights, as released files have them, give what fp32 ones do. For products in int8 activations are rounded,
too, where the CPU multiplies bytes. A longer prompt is read in bf16 where the weights are bf16 and the CPU
multiplies in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_miss.adapter import adapted_linears
from rwkv_miss.methods.token_rows import TokenRows

from .. import ops
from ..common.device import multiplies_bf16
from ..common.formatting import counted
from ..model import RWKV, LayerState, State
from ..ops import native, self_test
from ..ops.native import nan_passes
from . import bf16_products, int8_panels
from .adapters import BASE, Adapters, Applied
from .decoder_tensors import (
    BF16_PAIRS,
    BF16_SINGLE,
    LANES,
    PANELS,
    TYPES,
    Matrix,
    int8_rows,
    is_multiplied,
    names_in_order,
)
from .huge_pages import Region, rounded
from .prompt_logprobs import EachLogits, give_logits
from .unmerged_linear import LowRank, factors_of


class Change(ctypes.Structure):
    """Change of cuda/decode_parts.h."""

    _fields_ = [
        ("rank", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("A", ctypes.c_void_p),
        ("B", ctypes.c_void_p),
    ]


class ChangeTable(NamedTuple):
    """Table of adapters' changes to the matrices, which the native code has by number."""

    number: int  # the native code's number of the table; -1: no changes
    kept: list[Tensor]  # tensors that the native code points to


class Decoder:
    """RowDecoder with the states of `rows` rows, and the native code that computes their next tokens.

    `int8`: single tokens use the large matrices quantised, in panels (int8_panels.py) where the CPU
    multiplies bytes; `huge_pages` asks for pages of 2 MB for these. `bf16_activations`: where the CPU has
    instructions for it, activations are rounded to bf16 for products with bf16 weights; else they are split
    into two parts there, which is almost exact. There are as many threads as torch has. Some of the model's
    matrices are shared with it. Others, and all vectors, are copies that are made here. So when the model
    gets other tensors, as from Adapters.use, refresh() must be called. Of a model in training it keeps the
    values from the time it was made. Rows with another adapter than BASE need `adapters`. Raises ValueError
    where problem() finds one.
    """

    def __init__(
        self,
        model: RWKV,
        rows: int = 1,
        adapters: Adapters | None = None,
        *,
        int8: bool = False,
        huge_pages: bool = True,
        bf16_activations: bool = False,
    ):
        if reason := problem(model):
            raise ValueError(f"no decoder for this model: {reason}")
        if rows < 1:
            raise ValueError(f"a decoder for {rows} rows, expected at least one")
        self.model, self.rows, self.adapters, self.int8 = model, rows, adapters, int8
        self.threads = torch.get_num_threads()
        arch = self.arch = model.arch
        heads = arch.n_head, arch.head_size, arch.head_size
        self.state_shapes = LayerState((1, arch.n_embd), (1, *heads), (1, arch.n_embd))
        # states of all layers, (rows, L, ...)
        self.states = LayerState(
            *(torch.zeros(rows, arch.n_layer, *shape[1:]) for shape in self.state_shapes)
        )
        self.places = _addresses(self.states)
        self.names = names_in_order(arch)
        # the tensors of the model that the native code points to
        self.kept: dict[str, list[Tensor]] = {}
        # by the names of adapters, in the order of their last use
        self.tables: dict[tuple[str, ...], ChangeTable] = {}
        self.sources = [self._source(name) for name in self.names]
        self.bf16_type = TYPES[torch.bfloat16]
        if bf16_products.instruction_is_there():
            self.bf16_type = BF16_SINGLE if bf16_activations else BF16_PAIRS
        self.panels: dict[str, Tensor] = {}
        self.region = self._make_room(huge_pages) if int8 and int8_panels.instruction_is_there() else None
        self.matrices = [self._matrix(name, tensor) for name, tensor in zip(self.names, self.sources)]
        library = native.library("cpu")
        self.handle = self._open(library)
        self.fresh = True
        self.run, self.replace = library.decode_step, library.decode_replace
        self.put_table, self.close_native = library.decode_table, library.decode_close

    def _open(self, library: ctypes.CDLL) -> ctypes.c_void_p:
        """Give the native code the model; returns its handle."""
        arch = self.arch
        of_layers = (arch.n_layer, arch.n_embd, arch.dim_att, arch.n_head, arch.head_size, arch.dim_ffn)
        sizes = (*of_layers, arch.vocab_size, self.rows)
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
                f"decode_open takes no {len(self.names)} matrices for {arch.describe()}: LAYER of"
                " decoder_tensors.py is not that of cuda/decode_cpu.h"
            )
        return ctypes.c_void_p(handle)

    def _make_room(self, huge: bool) -> Region:
        """Allocate a region with a place for each packed matrix; a replacing matrix has the same shape."""
        sizes = {
            name: int8_panels.packed_bytes(*tensor.shape)
            for name, tensor in zip(self.names, self.sources)
            if tensor is not None and is_multiplied(name, tensor)
        }
        region = Region(sum(map(rounded, sizes.values())), huge)
        self.panels = {name: region.take(size) for name, size in sizes.items()}
        return region

    @property
    def reading(self) -> torch.dtype:
        """Return the dtype of a prompt's activations."""
        in_bf16 = self.model.dtype == torch.bfloat16 and multiplies_bf16()
        return torch.bfloat16 if in_bf16 else torch.float32

    def refresh(self) -> None:
        """Take over those of the model's tensors that changed; the others cost nothing."""
        self._check_open()
        # if this is interrupted, it is done again before the next token
        self.fresh = False
        self.tables.clear()  # each is made again when a row needs it
        for place, (name, before) in enumerate(zip(self.names, self.sources, strict=True)):
            tensor = self._source(name)
            if tensor is before:
                continue
            matrix = self._matrix(name, tensor)
            self.replace(self.handle, ctypes.c_int64(place), ctypes.byref(matrix))
            self.matrices[place], self.sources[place] = matrix, tensor
        self.fresh = True

    def close(self) -> None:
        """End the threads."""
        if self.handle:
            self.close_native(self.handle)
            self.handle = None

    def __del__(self):
        if getattr(self, "handle", None):
            self.close()

    def _source(self, name: str) -> Tensor | None:
        """Find the model's parameter of that name."""
        owner, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), leaf, None)

    def _matrix(self, name: str, tensor: Tensor | None) -> Matrix:
        """Describe a parameter for the native code; all zero if the model has none of that name."""
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
            tensor = (tensor if tensor.dtype in TYPES else tensor.float()).contiguous()
            if (packed := self.panels.get(name)) is not None:
                int8_panels.pack(tensor, packed, self.threads)
                return Matrix(packed.data_ptr(), None, rows, columns, PANELS)
            if self.int8 and is_multiplied(name, tensor):
                tensor, scale = int8_rows(tensor)
        self.kept[name] = [tensor] if scale is None else [tensor, scale]
        kind = TYPES[tensor.dtype]
        if tensor.dtype == torch.bfloat16 and is_multiplied(name, tensor):
            kind = self.bf16_type
        return Matrix(tensor.data_ptr(), None if scale is None else scale.data_ptr(), rows, columns, kind)

    def _table(self, names: tuple[str, ...]) -> int:
        """Return the number of the native table for these adapters; -1 if they change no matrix.

        The factors of several adapters are copies. So only the last used tables stay, one a row.
        """
        table = self.tables.pop(names, None)
        if table is None:
            joined = [key for key in self.tables if len(key) > 1] if len(names) > 1 else []
            for oldest in joined[: max(0, len(joined) + 1 - self.rows)]:
                del self.tables[oldest]
            table = self._new_table(names)
        self.tables[names] = table
        return table.number

    def _new_table(self, names: tuple[str, ...]) -> ChangeTable:
        changes = (Change * len(self.names))()
        pointed_to = []
        for name, low_rank in self._factors(names).items():
            A, B = low_rank.A, low_rank.B.t().contiguous()
            changes[self.names.index(f"{name}.weight")] = Change(
                len(B), low_rank.scale, None if A is None else A.data_ptr(), B.data_ptr()
            )
            pointed_to += [B] if A is None else [A, B]
        if not pointed_to:
            return ChangeTable(-1, pointed_to)
        taken = {table.number for table in self.tables.values()}
        number = next(number for number in itertools.count() if number not in taken)
        self.put_table(self.handle, ctypes.c_int64(number), changes)
        return ChangeTable(number, pointed_to)

    def _factors(self, names: tuple[str, ...]) -> dict[str, LowRank]:
        """Return these adapters' changes; without names, those of Adapters.use() or of the adapter in
        training."""
        if names:
            return self.adapters.factors(Applied(names))
        if training := adapted_linears(self.model):
            return {name: factors_of(layer) for name, layer in training.items()}
        changed = ((name, getattr(module, "low_rank", None)) for name, module in self.model.named_modules())
        return {name: low_rank for name, low_rank in changed if low_rank is not None}

    @torch.no_grad()
    def read(
        self, ids: Tensor, state: State | None, applied: Applied = BASE, each: EachLogits | None = None
    ) -> tuple[Tensor, State]:
        """Read ids as RowDecoder says. Raises ValueError for other shapes and after close(), IndexError for a
        token that is not in the vocabulary.
        """
        if state is None:
            state = self.model.initial_state(1)
        self._check(ids, state)
        if not self.fresh:
            self.refresh()
        if ids.shape[1] > 1:  # the native code does the last token
            state = self._read_many(ids[:, :-1], state, applied, each=each)
        return self._read_last(ids[:, -1].tolist(), state, applied)

    @torch.no_grad()
    def read_together(self, ids: Tensor, reset: Tensor | None) -> tuple[Tensor, State]:
        """Read prompts as RowDecoder says. The decoder must have as many rows."""
        self._check_open()
        before = self.model.initial_state(len(ids))
        state = self._read_many(ids[:, :-1], before, BASE, None if reset is None else reset[:, :-1])
        return self._read_last(ids[:, -1].tolist(), state, BASE)

    def _read_last(self, tokens: list[int], state: State, applied: Applied) -> tuple[Tensor, State]:
        """Compute (logits, states) after one more token of each row of a state, which stays as it is."""
        rows, layers = len(tokens), self.arch.n_layer
        before = self._together(state, rows)
        after = [torch.empty(rows, layers, *shape[1:]) for shape in self.state_shapes]
        logits = self._run(tokens, [applied] * rows, _addresses(before), _addresses(after))
        return logits, [LayerState(*parts) for parts in zip(*(part.unbind(1) for part in after))]

    @torch.no_grad()
    def state_after(
        self, ids: Tensor, state: State | None, applied: Applied = BASE, each: EachLogits | None = None
    ) -> State:
        """Read a chunk as RowDecoder says. The state has the dtype of `reading`."""
        if state is None:
            state = self.model.initial_state(1)
        self._check(ids, state)
        return self._read_many(ids, state, applied, each=each)

    def _read_many(
        self,
        ids: Tensor,
        state: State,
        applied: Applied,
        reset: Tensor | None = None,
        each: EachLogits | None = None,
    ) -> State:
        """Compute the state after tokens that are read with products of matrices, all at once.

        Where logits are wanted, activations are fp32.
        """
        to, wanted = self.reading, ids.new_empty(0)
        if each:
            to, wanted = torch.float32, torch.arange(ids.shape[1])
        state = [layer._replace(att_x=layer.att_x.to(to), ffn_x=layer.ffn_x.to(to)) for layer in state]
        with self.adapters.rows([applied]) if self.adapters else contextlib.nullcontext(), nan_passes():
            x, state = self.model.features(ids, state, reset, wanted)
            if each:
                give_logits(self.model, x, each)
        return state

    @torch.no_grad()
    def put(self, row: int, state: State) -> None:
        self._check_row(row)
        self._check_state(state)
        for own, part in zip(self.states, self._together(state, 1)):
            own[row] = part[0]

    def take(self, row: int) -> State:
        self._check_row(row)
        parts = [part[row : row + 1].clone().unbind(1) for part in self.states]
        return [LayerState(*of_layer) for of_layer in zip(*parts)]

    def move(self, source: int, target: int) -> None:
        self._check_row(source)
        self._check_row(target)
        for part in self.states:
            part[target].copy_(part[source])

    def step(self, tokens: Sequence[int], applied: Sequence[Applied]) -> Tensor:
        """Run the next tokens as RowDecoder says. A row that overflows does not change the others.

        Raises ValueError for more tokens than rows and after close(), IndexError as read() does.
        """
        self._check_open()
        if not 1 <= len(tokens) <= self.rows or len(tokens) != len(applied):
            raise ValueError(
                f"{counted(len(tokens), 'token')} for {counted(len(applied), 'adapter choice')}, expected as"
                f" many of both, from 1 to {self.rows}"
            )
        if not self.fresh:
            self.refresh()
        return self._run(tokens, applied, self.places, self.places)

    def _run(self, tokens, applied, before: ctypes.Array, after: ctypes.Array) -> Tensor:
        for token in tokens:
            if not 0 <= token < self.arch.vocab_size:
                raise IndexError(f"token {token} is not in the vocabulary of {self.arch.vocab_size}")
        count = len(tokens)
        tables = [self._table(one.names) for one in applied]
        logits = torch.empty(count, self.arch.vocab_size)
        self.run(
            self.handle,
            ctypes.c_int64(count),
            (ctypes.c_int64 * count)(*tokens),
            (ctypes.c_int64 * count)(*tables),
            (ctypes.c_float * count)(*[one.scale for one in applied]),
            before,
            after,
            ctypes.c_void_p(logits.data_ptr()),
        )
        return logits

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
        self._check_state(state)

    def _check_row(self, row: int) -> None:
        self._check_open()
        if not 0 <= row < self.rows:
            raise ValueError(f"row {row}, expected one of the decoder's {self.rows}, from 0 on")

    def _check_state(self, state: State) -> None:
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

    def _ready(self, part: Tensor | None, layer: int) -> Tensor:
        """Prepare a part of a state for the native code; None is the WKV state that documents start from."""
        if part is None:
            part = self.model.blocks[layer].att.initial_state()
        if part is None:
            part = torch.zeros(self.arch.n_head, self.arch.head_size, self.arch.head_size)
        return part.to("cpu", torch.float32)

    def _together(self, state: State, rows: int) -> list[Tensor]:
        """Join the parts of a state with all layers, as the native code reads them: (rows, L, ...)."""
        return [
            torch.stack([self._ready(part, i).view(rows, *shape[1:]) for i, part in enumerate(parts)], 1)
            for parts, shape in zip(zip(*state, strict=True), self.state_shapes, strict=True)
        ]


def _addresses(states: Sequence[Tensor]) -> ctypes.Array:
    """Return the addresses of each part of each layer of each row, from parts (rows, L, ...)."""
    rows, layers = states[0].shape[:2]
    begins = np.array([part.data_ptr() for part in states])
    sizes = np.array([part[0, 0].nbytes for part in states])
    addresses = begins + np.arange(rows * layers)[:, None] * sizes
    return (ctypes.c_void_p * addresses.size)(*addresses.ravel().tolist())


def problem(model: RWKV) -> str:
    """Say why the native code can't compute this model's tokens; "" if it can."""
    if model.emb.weight.device.type != "cpu":
        return f"the model is on {model.emb.weight.device}"
    if (kernel := model.kernel) != "cpu":
        return f"the kernel is {kernel}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"the weights are {model.dtype}"
    if not next(model.blocks[0].att.output.parameters()).is_floating_point():
        return "its base is quantised"
    adapted = adapted_linears(model)
    if "emb" in adapted and not isinstance(adapted["emb"], TokenRows):
        return f"{adapted['emb'].method} changes the whole embedding"
    of_classes = {type(layer): layer for layer in adapted.values()}
    for layer in of_classes.values():
        if layer.changes_frozen_weight() or layer.low_rank() is None:
            return f"{layer.method} adds no factors to a frozen weight"
    return ops.head_size_problem(model.arch.head_size) or self_test.status("cpu").reason
