"""Step memory: the bytes of a training step, counted by running it on tensors without memory.

A formula for every layer, adapter, kernel and precision would be wrong after the next change of the model.
Here the model's own code runs under torch's FakeTensorMode, which makes tensors of shapes alone, and every
storage that comes and goes is added up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.quantised import empty

from ..common.batch import Batch
from ..common.device import PRECISIONS
from ..common.freed_memory import HEAP_LIMIT
from ..config import Config
from ..config.adapter_options import AdapterOptions
from ..model import RWKV
from ..model.batch_loss import state_bytes
from ..model.rwkv import replace_tensors
from ..ops import per_document
from ..ops.native import tensor_cores_planned
from ..sources import source_of
from ..sources.base import Source
from ..sources.estimates import SharedPrompts

COUNTED_CHUNKS = 4  # the most chunks of a row that are counted; each further chunk adds the same
LAYERS = 4  # the most layers that are counted; each further layer adds the same


@dataclasses.dataclass(frozen=True)
class StepBytes:
    """Tensors of one forward and backward pass, without parameters and gradients; all in bytes."""

    activations: float  # kept by the layers for the backward
    peak: float  # most that live at one time
    small: float  # most that live in blocks of at most HEAP_LIMIT
    large: float  # most that live in larger blocks


def model_on_meta(arch: Arch, adapter: AdapterOptions | None) -> RWKV:
    """Build the model with its trained parts, as shapes alone."""
    with torch.device("meta"):
        model = RWKV(arch)
        if adapter:
            adapter.inject(model)
    return model


def step_bytes(
    arch: Arch,
    config: Config,
    kernel: str,
    precision: str,
    row: int,
    targets: int,
    shared: SharedPrompts | None = None,
    backward: bool = True,
    documents: Sequence[Sequence[int]] = (),
) -> StepBytes:
    """Count the bytes of one micro-batch: micro_bsz rows of `row` tokens, with `targets` trained tokens in
    all.

    `kernel` and `precision` are not auto. With `shared` the batch has these sizes instead of the rows'.
    Without `backward` the batch is run without gradients. `documents` are the lengths of those in each row,
    which count if they begin with a tuned state. Layers without an adapter between others are counted as if
    they had one.
    """
    chunks = source_of(config).chunks
    whole = row
    if chunks.count(row) > COUNTED_CHUNKS:
        row = COUNTED_CHUNKS * chunks.size
        targets = max(1, targets * row // whole)

    # a layer without a backward leaves its state alone, until the head has run: one of them is counted
    below = config.adapted_layers(arch.n_layer)[0]
    trained, others = arch.n_layer - below, dataclasses.replace(arch, n_layer=max(below - 1, 0))

    def count(layers: int) -> StepBytes:
        fewer = dataclasses.replace(arch, n_layer=min(below, 1) + layers)
        these = dataclasses.replace(config, layers=f"last:{layers}" if below else "")
        return _count(fewer, these, kernel, precision, row, targets, shared, backward, documents)

    step = count(min(trained, LAYERS))
    if trained > LAYERS:
        fewer, further = dataclasses.astuple(count(LAYERS - 1)), trained - LAYERS
        pairs = zip(dataclasses.astuple(step), fewer, strict=True)
        step = StepBytes(*(many + (many - few) * further for many, few in pairs))
    # a chunk that was not counted keeps a state
    sizes = config.micro_bsz, PRECISIONS[precision].itemsize
    states = (chunks.states(whole) - chunks.states(row)) * state_bytes(arch, *sizes)
    activations = step.activations + states + state_bytes(others, *sizes)
    return StepBytes(activations, step.peak + states, step.small + states, step.large)


def _count(
    arch: Arch,
    config: Config,
    kernel: str,
    precision: str,
    row: int,
    targets: int,
    shared: SharedPrompts | None = None,
    backward: bool = True,
    documents: Sequence[Sequence[int]] = (),
) -> StepBytes:
    # fp16 has bf16's size, and a CPU kernel would turn it into fp32
    half = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.bfloat16}[precision]
    full = config.peft == "none"
    model = model_on_meta(arch, config.adapter)
    model.grad_cp = config.grad_cp
    model.computes_in = half if full else None
    quantised = set()
    if config.quant != "none":
        quantised = {f"{name}.weight" for name in model.layer_linears()}
        model.computes_in = half or torch.float32
    with FakeTensorMode():  # this imports torch._dynamo, which takes a second

        def fake(name: str, tensor: Tensor) -> Tensor:
            if name in quantised:
                return empty(config.quant, *tensor.shape)
            of_base = isinstance(tensor, nn.Parameter) and not tensor.requires_grad and not full
            return torch.empty(tensor.shape, dtype=half if of_base and half else tensor.dtype)

        replace_tensors(model, fake)
        for p in model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None  # as from an earlier micro-batch
        model.set_kernel(kernel)
        model.head.on_gpu = kernel.startswith("cuda") or config.accelerator == "gpu"
        # only the CPU's native WKV runs here; the GPU's takes no more memory
        if kernel.startswith("cuda"):
            for block in model.blocks:
                block.att.kernel = "cpu"
        has_states = any(name.endswith(".time_state") for name, _ in model.named_parameters())
        source = source_of(config)
        packed = config.packing or config.draws_answers
        # with an initial state documents are cut out of their rows, where these have several
        packed = packed and (not has_states or any(len(lengths) > 1 for lengths in documents))
        batch = _batch(source, config.micro_bsz, row, targets, packed, shared, not has_states)
        known = [*batch.tensors().values(), *model.buffers(), *model.parameters()]
        known += [p.grad for p in model.parameters()]
        with (
            _documents_of(documents, config.micro_bsz),
            tensor_cores_planned(kernel == "cuda"),
            Live([t for t in known if torch.is_tensor(t)]) as live,
        ):
            activations = live.after(model, "features")
            with torch.set_grad_enabled(backward), without_values(config.loss):
                loss, _ = source.loss(model, batch, source.chunks)
            if backward:
                loss.backward()
    return StepBytes(max(activations), live.peak, live.small, live.large)


@contextlib.contextmanager
def without_values(loss: str) -> Iterator[None]:
    """Name the loss in an error about tensors without values."""
    try:
        yield
    except (DynamicOutputShapeException, DataDependentOutputException) as error:
        raise TypeError(
            f"--loss {loss}: a size depends on a tensor's value ({error}), and the plan runs a step on"
            " tensors without values; take sizes from the batch's shapes and from batch.ends"
        ) from error


@contextlib.contextmanager
def _documents_of(documents: Sequence[Sequence[int]], rows: int) -> Iterator[None]:
    """Make the documents that are cut out of rows (ops/per_document.py) these, although the tensors have
    no values. Every chunk has those of the fullest one."""

    @functools.lru_cache(maxsize=1)  # as layout() itself
    def of_width(width: int) -> per_document.Layout:
        with _disable_current_modes():
            begins = torch.zeros(rows, max(width, *map(sum, documents)), dtype=torch.bool)
            for i, lengths in enumerate(documents):
                begins[i, [0, *itertools.accumulate(lengths[:-1])]] = True
            chunks = [part for part in begins.split(width, 1) if part.shape[1] == width]
            found = layout(max(chunks, key=lambda part: int(part[:, 1:].sum())))
        return tree_map(lambda x: torch.empty(x.shape, dtype=x.dtype), found)

    layout = per_document.layout
    per_document.layout = lambda reset: of_width(reset.shape[1])
    try:
        yield
    finally:
        per_document.layout = layout


def _batch(
    source: Source,
    rows: int,
    row: int,
    targets: int,
    packed: bool,
    shared: SharedPrompts | None,
    pads: bool,
) -> Batch:
    """Make a batch as the run does, with equal shares of the trained tokens in equal chunks.

    `pads`: padded prompts begin with a reset.
    """
    chunk = source.chunks.size
    size = chunk or row
    counts = [max(1, round(targets * min(size, row - start) / row)) for start in range(0, row, size)]
    reads, names = source.reads(), ["ids", "where", "targets"]
    sizes = {"rows": rows, "width": row, "trained": sum(counts), "answers": rows * reads.answers}
    if shared:
        sizes |= {"rows": shared.rows, "width": shared.answer}
        sizes |= {"prompts": shared.prompts, "prompt": shared.prompt}
        names += ["prompts", "prompt_of", *(["prompt_reset"] if pads and shared.prompts > 1 else [])]
    elif packed:
        names.append("reset")
    return Batch.zeros(names, sizes, reads, ends=tuple(itertools.accumulate(counts)), chunk=chunk)


class Live(TorchDispatchMode):
    """Counter of the bytes of living storages: `now`, and the most at one time, `peak`, also by size.

    Storages of `known` are left out.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.seen = {t.untyped_storage()._cdata for t in known}
        self.now_small = self.now_large = self.peak = self.small = self.large = 0

    @property
    def now(self) -> int:
        return self.now_small + self.now_large

    def after(self, owner, method: str) -> list[int]:
        """Record the living bytes after each call of a method, from now on."""
        call, seen = getattr(owner, method), []

        def watched(*args, **kwargs):
            result = call(*args, **kwargs)
            seen.append(self.now)
            return result

        setattr(owner, method, watched)
        return seen

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch._dynamo is consulted at each operator, and it is not at work here

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # a fast path for more than half of all calls
        if op is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True  # to the plain kernels, which ask whether all is finite
        result = op(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self._change(size)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self._change(size, -1)

    def _change(self, size: int, sign: int = 1) -> None:
        if size > HEAP_LIMIT:
            self.now_large += sign * size
        else:
            self.now_small += sign * size
        self.peak = max(self.peak, self.now)
        self.small = max(self.small, self.now_small)
        self.large = max(self.large, self.now_large)
