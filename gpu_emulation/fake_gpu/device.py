"""`FakeGpu`: in it tensors on cuda have no numbers, and what a GPU would be asked for is counted.

Tensors of the CPU stay what they are. What is copied from the device to the CPU is ones, and so is a number
that is read from there. Small tensors that came from the CPU keep their values (masks, lengths), so that a
program goes the way it would go.
"""

import collections
import contextlib
import pathlib
import sys
import types
import weakref

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.op_counts import KERNELS, Tally, tensors_in
from src.ops import self_test

ROOT = pathlib.Path(__file__).parent.parent.parent
HERE = pathlib.Path(__file__).parent
GIB = 1 << 30
REMEMBERED = 1 << 12  # elements of a tensor from the CPU whose values are known on the device, too

KEEP_VALUES = {"select", "slice", "unbind", "alias", "detach", "view", "unsqueeze", "squeeze"}
MASKED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
COPIES = {"_to_copy", "copy_"}
DEVICE = torch.ops.prim.device.default
LOSS = str(ROOT / "src/model/loss.py")


class FakeGpu(TorchDispatchMode):
    """Counts launches, bytes and multiply-adds by kind (`tally`); `waits` for the device and `copies` between
    devices, by their place in our code; `native`, our own kernels by their dtype; and `peak`, the most bytes
    of the device that lived at one time.

    A mask that was made on the device is true everywhere. That of next_logits() has the last token of every
    row.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.allocated = 0
        self.storages: set[int] = set()
        self.base: set[int] | None = None
        self.begin()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch._dynamo is not told to look away at each operator: it is not at work here

    def tell_base(self, weights) -> None:
        """Products with these are the base's, all others an adapter's."""
        self.base = {tensor.untyped_storage()._cdata for tensor in weights}

    def begin(self) -> None:
        """Count from now on."""
        self.tally, self.peak = Tally(), self.allocated
        self.waits, self.copies, self.native = (collections.Counter() for _ in range(3))

    def counts(self) -> dict:
        """Return the counts so far."""
        return {
            "launches": {"total": self.tally.launches.total(), **self.tally.launches},
            **{name: dict(getattr(self, name)) for name in ("waits", "copies", "native")},
        }

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # every second call
        kwargs = kwargs or {}
        tensors = tensors_in(args)
        if kwargs:
            tensors += tensors_in(kwargs.values())
        fakes = [x for x in tensors if isinstance(x, FakeTensor)]
        if op._schema.name == "aten::_pin_memory":
            pinned = args[0].clone()
            pinned.pinned = True
            return pinned
        if fakes and fakes[0].fake_mode is not self.fake or not fakes and not _is_cuda(kwargs.get("device")):
            return op(*args, **kwargs)  # the CPU's, or the project's own count of memory
        name = op._schema.name.split("::")[1]
        # inside one of our operators torch hands it on whole; most of the time it casts nothing
        if name == "to":
            with self:
                return op.decompose(*args, **kwargs)
        known = getattr(args[0], "known", None) if args and isinstance(args[0], Tensor) else None
        if name in KEEP_VALUES and known is not None:
            return self._view(op, known, args, kwargs)
        if name in ("_local_scalar_dense", "equal", "is_nonzero"):
            self._wait(name)
            if known is not None and name == "_local_scalar_dense":
                return known.item()
            return True if name != "_local_scalar_dense" else torch.ones((), dtype=args[0].dtype).item()
        if name == "nonzero":
            self._wait(name)
            return args[0].new_empty(self._set_bits(args[0]), args[0].dim(), dtype=torch.int64)
        if name in MASKED and any(_is_mask(i) for i in args[1]):
            self._wait(f"{name} with a mask")
            args = (args[0], [j for i in args[1] for j in self._indices(i)], *args[2:])
        if name in COPIES and (result := self._copy(op, name, known, args, kwargs)) is not None:
            return result
        if op.namespace in ("rwkv", "rwkv_miss"):
            self._kernel(op, name, tensors, args)
        if op._schema.is_mutable and isinstance(args[0], Tensor):
            args[0].known = None
        if len(fakes) < len(tensors):
            args, kwargs = tree_map(self._stand_in, (args, kwargs))
        with self.fake:
            result = op(*args, **kwargs)
        self.tally.add(op, args, kwargs, result, _in_loss(), self._of_base)
        if name == "dequantise" and self.base is not None:
            self.base.add(result.untyped_storage()._cdata)
        for tensor in tensors_in((result,)):
            if isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda":
                self._allocate(tensor.untyped_storage())
        return result

    def _of_base(self, tensor: Tensor) -> bool:
        return self.base is None or tensor.untyped_storage()._cdata in self.base

    def _view(self, op, known, args, kwargs):
        with self.fake:
            result = op(*args, **kwargs)
        for view, values in zip(
            tree_leaves(result), tree_leaves(op(known, *args[1:], **kwargs)), strict=True
        ):
            view.known = values
        return result

    def _copy(self, op, name, known, args, kwargs) -> Tensor | None:
        """The result of a copy between devices; None for one that stays on the device."""
        source = args[1] if name == "copy_" else args[0]
        target = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
        if target.type == source.device.type:
            return None
        self.copies[f"to {target.type}: {_place()}"] += 1
        non_blocking = kwargs.get("non_blocking") or name == "copy_" and len(args) > 2 and args[2]
        if target.type == "cpu":
            if not non_blocking:
                self._wait("copy to cpu")
            if name == "copy_":
                return args[0].fill_(1)
            return (
                op(known, **kwargs)
                if known is not None
                else torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            )
        # the driver first copies memory that is not pinned, and that may wait for what runs
        if not (source.numel() < 2 or non_blocking and getattr(source, "pinned", False)):
            self._wait("copy to cuda")
        if name == "copy_":
            args[0].known = None
            return args[0]
        with self.fake:
            result = torch.empty_strided(
                source.shape, source.stride(), dtype=kwargs.get("dtype") or source.dtype, device=target
            )
        self._allocate(result.untyped_storage())
        if source.numel() < REMEMBERED:
            result.known = source.detach().clone().to(result.dtype)
        return result

    def _kernel(self, op, name, tensors, args):
        """A call of our own kernels, which take contiguous tensors of one device."""
        assert name in KERNELS, f"{op}: add it to KERNELS of benchmarks/op_counts.py"
        device = tensors[0].device
        wrong = [
            i
            for i, x in enumerate(tensors)
            if not x.is_contiguous() or x.device != device or device.type != "cuda"
        ]
        assert not wrong, f"{name}: arguments {wrong} are not contiguous on {device}"
        kind = str(args[2] if name == "dequantise" else tensors[0].dtype).removeprefix("torch.")
        chunked = name.startswith("mix7_chunked") or name.startswith("wkv") and args[-1]
        self.native[f"{name} {kind}{', tensor cores' if chunked else ''}"] += 1

    def _wait(self, what: str) -> None:
        self.waits[f"{what}: {_place()}"] += 1

    def _stand_in(self, x):
        """Return a CPU tensor without numbers, which FakeTensorMode wants among those of the device."""
        if not isinstance(x, Tensor) or isinstance(x, FakeTensor):
            return x
        with self.fake:
            return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def _set_bits(self, mask: Tensor) -> int:
        if (known := getattr(mask, "known", None)) is not None:
            return int(known.count_nonzero())
        frame = sys._getframe()
        while frame:
            if frame.f_code.co_name == "next_logits" and mask.dim() == 2:
                return mask.shape[0]  # the last token of every row
            frame = frame.f_back
        return mask.numel()

    def _indices(self, index: Tensor | None) -> list[Tensor | None]:
        """One index for every dimension of a mask; any other index as it is."""
        return (
            [index.new_empty(self._set_bits(index), dtype=torch.int64) for _ in index.shape]
            if _is_mask(index)
            else [index]
        )

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages.add(key)
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.allocated -= size


def _is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _is_mask(index) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def _in_loss() -> bool:
    """Look for src/model/loss.py on the stack."""
    frame = sys._getframe(1)
    while frame:
        if frame.f_code.co_filename == LOSS:
            return True
        frame = frame.f_back
    return False


def _place() -> str:
    """The file and function of ours that is at work; in a backward of torch's own there is none."""
    frame = sys._getframe(1)
    while frame:
        path = pathlib.Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and not path.is_relative_to(HERE) and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)} {frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"


class _Graph:
    """torch.cuda.CUDAGraph, which records nothing."""

    def replay(self) -> None:
        pass


class _Stream:
    cuda_stream = 0

    def __init__(self, device=None):
        pass

    def wait_stream(self, other) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def synchronize(self) -> None:
        _wait_of_program("stream")
        _synchronize()


class _Event:
    def __init__(self, *args, **kwargs):
        self.sent = 0

    def record(self, stream=None) -> None:
        self.sent = torch.ops.fake_gpu.sent()

    def wait(self, stream=None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _wait_of_program("event")
        torch.ops.fake_gpu.wait(self.sent)

    def elapsed_time(self, later) -> float:
        return 1.0


def _synchronize(device=None) -> None:
    torch.ops.fake_gpu.wait(torch.ops.fake_gpu.sent())


def _wait_of_program(what: str) -> None:
    """Count a wait that is no operator."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, FakeGpu):
            mode._wait(what)


def _swap(old: Tensor, new: Tensor) -> None:
    """torch.utils.swap_tensors, which refuses tensors with weak references, as all FakeTensors have one."""
    old.__class__, new.__class__ = new.__class__, old.__class__
    old.__dict__, new.__dict__ = new.__dict__, old.__dict__
    torch._C._swap_tensor_impl(old, new)


def install() -> None:
    """Answer as a GPU would, for the rest of the process, and let its tensors be without numbers."""
    answer((9, 0))
    fake_tensor.init_gpu_context = lambda device=None: None
    # an address that is aligned as the view is
    FakeTensor.data_ptr = lambda self: self.storage_offset() * self.element_size()
    FakeTensor.tolist = lambda self: self.cpu().tolist()  # one copy, as a GPU makes it
    # Module.to() keeps the parameters that optimizers know
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.utils.swap_tensors = _swap
    # torch.tensor(..., device="cuda") is a copy that modes see
    torch._C._set_only_lift_cpu_tensors(True)
    self_test.status.cache_clear()
    self_test.status = lambda device: self_test.Status(True, True, "fake.so", 0.0, 1e-6)


def answer(capability: tuple[int, int], graph: type = _Graph, recording=contextlib.nullcontext) -> None:
    """Answer what torch.cuda asks a driver for as a GPU of 24 GiB would, for the rest of the process."""
    properties = types.SimpleNamespace(
        total_memory=24 * GIB,
        major=capability[0],
        minor=capability[1],
        name="fake GPU",
        multi_processor_count=132,
    )
    answers = {
        "is_available": True,
        "is_initialized": False,
        "device_count": 1,
        "get_device_name": "fake GPU",
        "get_device_capability": capability,
        "get_device_properties": properties,
        "is_bf16_supported": True,
        "mem_get_info": (23 * GIB, 24 * GIB),
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "memory_stats": {},
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "_lazy_init": None,
        "manual_seed_all": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "current_stream": _Stream(),
        "default_stream": _Stream(),
        "stream": contextlib.nullcontext(),
    }
    for name, found in answers.items():
        setattr(torch.cuda, name, lambda *args, found=found, **kwargs: found)
    torch.cuda.synchronize = _synchronize
    torch.cuda.current_device = torch.ops.fake_gpu.device
    torch.cuda.set_device = lambda device: torch.ops.fake_gpu.set_device(torch.device(device).index or 0)
    torch.cuda.Stream, torch.cuda.Event = _Stream, _Event
    torch.cuda.CUDAGraph, torch.cuda.graph = graph, recording
    Tensor.record_stream = lambda tensor, stream: None
