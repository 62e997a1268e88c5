"""The replayed token, without a GPU: a stand-in records operations with their memory and runs them again."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from src import ops
from src.inference import cpu_decoder, cuda_graph
from src.inference.cuda_graph import GraphedDecoder
from src.model import RWKV

from .conftest import make_arch, random_tensors


class Stream:
    def wait_stream(self, other):
        pass


class Graph(TorchDispatchMode):
    """As a CUDA graph: an operation reads and writes the memory that it had when it was recorded.

    Nothing of a recording is computed before the first replay. What would wait for the device is an error.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        results = operation(*arguments, **(keywords or {}))
        self.calls.append((operation, arguments, keywords or {}, results))
        return results

    def __exit__(self, *error):
        super().__exit__(*error)
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


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """What GraphedDecoder takes of torch.cuda, and the kernel of a GPU's models, on the CPU."""
    for name, stand_in in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": contextlib.nullcontext,
        "CUDAGraph": Graph,
        "graph": lambda graph: graph,
    }.items():
        monkeypatch.setattr(cuda_graph.torch.cuda, name, stand_in)
    monkeypatch.setitem(ops.NATIVE, "cuda", "cpu")


def random_model(version):
    model = RWKV(make_arch(version, n_layer=3), kernel="cpu").eval().requires_grad_(False)
    for block in model.blocks:
        block.att.kernel = "cuda"  # the elementwise functions stay the CPU's
    model.load_state_dict(random_tensors(model.arch))
    return model


PROMPT, ONE = torch.tensor([[3, 1, 4]]), torch.tensor([[1]])


@pytest.mark.parametrize("version", [6, 7])
def test_tokens_and_states_are_the_models_and_stay_what_they_were(version):
    model = random_model(version)
    decoder = GraphedDecoder(model)
    _, state = decoder.next_logits(PROMPT)
    assert decoder.graph is None, "a prompt is the model's"
    given, other = state, state
    results = [(t, t.clone()) for layer in given for t in layer]
    graphs = set()
    for token in (1, 5, 9, 1):
        want, state = model.next_logits(torch.tensor([[token]]), state)
        got, other = decoder.next_logits(torch.tensor([[token]]), other)
        torch.testing.assert_close(got, want)
        results += [(t, t.clone()) for t in (got, *(part for layer in other for part in layer))]
        for mine, theirs in zip(
            (t for layer in other for t in layer), (t for layer in state for t in layer), strict=True
        ):
            torch.testing.assert_close(mine, theirs)
        graphs.add(decoder.graph)
    assert len(graphs) == 1, "recorded once"
    assert all(torch.equal(now, then) for now, then in results)


def test_a_chat_on_a_gpu_takes_the_graph_or_the_model_where_it_fails():
    model = random_model(7)
    answers, how = cpu_decoder.fastest(model)
    assert isinstance(answers, GraphedDecoder) and answers.graph is not None
    assert how == "one CUDA graph a token"
    # a number for Python waits for the device
    model.head.register_forward_hook(lambda layer, inputs, x: x * float(x.isfinite().all()))
    answers, how = cpu_decoder.fastest(model)
    assert answers is model
    assert how.endswith("as a CUDA graph does not work: operation not permitted when stream is capturing")


def test_a_graph_with_other_numbers_is_refused():
    """A hook runs while the graph is recorded, and not when it is replayed."""
    model, calls = random_model(7), []

    def other_when_recorded(layer, inputs, x):
        calls.append(1)
        return x * 1.1 if len(calls) == 4 else x  # after a prompt, the model's token, and the one to warm up

    model.head.register_forward_hook(other_when_recorded)
    with pytest.raises(RuntimeError, match="of the largest one off"):
        GraphedDecoder(model).check()
    assert len(calls) == 4


def test_a_model_with_other_tensors_is_recorded_again():
    """As after Adapters.use; the parts of the state get the dtype that the model has then."""
    model = random_model(7)
    decoder = GraphedDecoder(model)
    _, state = decoder.next_logits(PROMPT)
    decoder.next_logits(ONE, state)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        model.head.weight = torch.nn.Parameter(2 * model.head.weight)
        recorded = decoder.graph
        decoder.refresh()
        assert decoder.graph is None
        _, state = decoder.next_logits(PROMPT)
        got, after = decoder.next_logits(ONE, state)
        torch.testing.assert_close(got, model.next_logits(ONE, state)[0])
        assert decoder.graph is not recorded and got.dtype == after[0].att_x.dtype == dtype


def test_a_graph_holds_the_tensors_that_it_was_recorded_with():
    """Why refresh() is there."""
    model = random_model(6)
    decoder = GraphedDecoder(model)
    _, state = decoder.next_logits(PROMPT)
    before, _ = decoder.next_logits(ONE, state)
    model.head.weight = torch.nn.Parameter(2 * model.head.weight)
    assert torch.equal(decoder.next_logits(ONE, state)[0], before)
    decoder.refresh()
    torch.testing.assert_close(decoder.next_logits(ONE, state)[0], 2 * before)
