"""A stand-in for torch.cuda.CUDAGraph, on any device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph(TorchDispatchMode):
    """As a CUDA graph: an operation reads and writes the memory that it had when it was recorded.

    Nothing of a recording is computed before the first replay, and what was there stays as it was. What would
    wait for the device is an error.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.written = [], []

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        if operation._schema.is_mutable:
            inputs = [t for t in tree_leaves((arguments, keywords)) if torch.is_tensor(t)]
            self.written += [(t, t.clone()) for t in inputs]
        results = operation(*arguments, **(keywords or {}))
        self.calls.append((operation, arguments, keywords or {}, results))
        return results

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, before in reversed(self.written):
            tensor.copy_(before)
        for _, arguments, keywords, results in self.calls:
            for result in new_tensors(results, (arguments, keywords)):
                result.fill_(torch.nan if result.is_floating_point() else 0)

    def replay(self):
        for operation, arguments, keywords, results in self.calls:
            again = operation(*arguments, **keywords)
            inputs = (arguments, keywords)
            for result, now in zip(new_tensors(results, inputs), new_tensors(again, inputs), strict=True):
                result.copy_(now)


def new_tensors(results, inputs):
    """The tensors of an operation's results that are neither its inputs nor views of them."""
    results, inputs = ([t for t in tree_leaves(tree) if torch.is_tensor(t)] for tree in (results, inputs))
    old = {t.untyped_storage().data_ptr() for t in inputs}
    return [t for t in results if t.untyped_storage().data_ptr() not in old]
