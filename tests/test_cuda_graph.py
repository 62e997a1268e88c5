"""Replayed tokens, without a GPU: a stand-in records operations with their memory and runs them again."""

import contextlib

import pytest
import torch

from src import ops
from src.inference import cuda_graph
from src.inference.adapters import BASE, Adapters, Applied
from src.inference.cuda_graph import GraphedDecoder
from src.inference.decoders import fastest
from src.inference.torch_decoder import TorchDecoder
from src.model import RWKV
from src.ops import native

from .conftest import make_arch, random_tensors
from .recorded_graph import Graph
from .test_cpu_decoder import some_ids
from .test_live_adapters import train


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """Stand in on the CPU for the parts of torch.cuda that GraphedDecoder uses, and for a GPU's kernel."""
    for name, stand_in in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": contextlib.nullcontext,
        "CUDAGraph": Graph,
        "graph": lambda graph: graph,
    }.items():
        monkeypatch.setattr(cuda_graph.torch.cuda, name, stand_in)
    monkeypatch.setitem(ops.NATIVE, "cuda", "cpu")
    with native.nan_passes():  # as on a GPU
        yield


def random_model(version):
    model = RWKV(make_arch(version, n_layer=3), kernel="cpu").eval().requires_grad_(False)
    model.load_state_dict(random_tensors(model.arch))
    return on_stand_in(model)


def on_stand_in(model):
    for block in model.blocks:
        block.att.kernel = "cuda"  # the elementwise functions stay the CPU's
    return model


def prompts(model, rows):
    """A prompt for each row, all of another length."""
    ids = some_ids(model.arch, 40)[0]
    return [ids[None, row : 2 * row + 3] for row in range(rows)]


def put_prompts(decoder, rows, applied=BASE):
    for row, prompt in enumerate(prompts(decoder.model, rows)):
        decoder.put(row, decoder.read(prompt, None, applied)[1])


def close_rows(decoder, other, rows):
    for row in range(rows):
        for mine, theirs in zip(decoder.take(row), other.take(row), strict=True):
            for part, its in zip(mine, theirs, strict=True):
                torch.testing.assert_close(part, its)


@pytest.mark.parametrize("version", [6, 7])
def test_tokens_and_states_of_any_number_of_rows_are_the_models(version):
    """Rows come, move and go; graphs are of 1, 2, 4 and all rows, and each is recorded once."""
    model = random_model(version)
    decoder, plain = GraphedDecoder(model, 5), TorchDecoder(model, 5)
    for one in (decoder, plain):
        put_prompts(one, 3)
    assert not decoder.graphs, "a prompt is the model's"
    results, graphs = [], {}
    for count in (3, 3, 1, 2, 5, 3):
        if count == 1:
            for one in (decoder, plain):
                one.move(2, 0)
        if count == 5:
            for one in (decoder, plain):
                one.put(3, one.take(1))  # rows 3 and 4 were free
                one.put(4, one.take(2))
        tokens = [(7 * count + i) % model.arch.vocab_size for i in range(count)]
        got = decoder.step(tokens, [BASE] * count)
        torch.testing.assert_close(got, plain.step(tokens, [BASE] * count))
        close_rows(decoder, plain, count)
        results.append((got, got.clone()))
        graphs |= {id(recorded): recorded for recorded in decoder.graphs.values()}
    assert {count for count, _ in decoder.graphs} == {1, 2, 4, 5} and len(graphs) == 4
    assert all(torch.equal(now, then) for now, then in results), "logits stay what they were"


def test_unused_rows_spoil_nothing():
    """A row of garbage stays in its row, and a new one takes its place."""
    model = random_model(7)
    decoder, plain = GraphedDecoder(model, 4), TorchDecoder(model, 4)
    for one in (decoder, plain):
        put_prompts(one, 3)
    for part in decoder.states:
        part[:, 3].fill_(torch.nan)
    tokens = [5, 6, 7]
    torch.testing.assert_close(decoder.step(tokens, [BASE] * 3), plain.step(tokens, [BASE] * 3))
    for one in (decoder, plain):
        one.put(3, one.take(0))
    tokens.append(8)
    torch.testing.assert_close(decoder.step(tokens, [BASE] * 4), plain.step(tokens, [BASE] * 4))


@pytest.mark.parametrize("version", [6, 7])
def test_one_graph_serves_any_mix_of_adapters(version, checkpoint, tmp_path):
    """Also one that joins in the place of another; rows without take the base's graph when they are alone."""
    base = checkpoint(version)
    files = {
        "a": train(base, tmp_path / "a.pth", "miss", seed=1, train_parts="emb,head", tokens=[3, 4]),
        "b": train(base, tmp_path / "b.pth", "miss", seed=2, train_parts="emb,head", tokens=[1, 9]),
        "c": train(base, tmp_path / "c.pth", "lora", seed=3),
    }
    adapters = Adapters(on_stand_in(RWKV.load(base, kernel="cpu").eval()), files)
    model = adapters.model
    decoder, plain = GraphedDecoder(model, 4, adapters), TorchDecoder(model, 4, adapters)
    for one in (decoder, plain):
        put_prompts(one, 4, Applied(("b",)))

    def step(*applied):
        tokens = [3, 1, 4, 1][: len(applied)]
        got = decoder.step(tokens, applied)
        torch.testing.assert_close(got, plain.step(tokens, applied), rtol=1e-4, atol=1e-5)
        return got

    a, b, c = (Applied((name,), 0.7) for name in "abc")
    step(a, BASE, c, b)
    recorded = dict(decoder.graphs)
    for mix in ((a, a, a, b), (c, Applied(("a", "c"), 0.3), BASE, b), (c, BASE, a, BASE)):
        step(*mix)
        assert decoder.graphs == recorded
    step(BASE, BASE, BASE, BASE)
    assert decoder.graphs.keys() == {(4, True), (4, False)}
    adapters.drop("b")
    adapters.add("d", train(base, tmp_path / "d.pth", "miss", seed=4, train_parts="emb,head", tokens=[3, 8]))
    decoder.refresh()
    before = step(BASE, a, c, BASE)
    after = step(Applied(("d",)), a, c, BASE)
    assert decoder.graphs[4, True] is recorded[4, True] and not torch.equal(after, before)
    adapters.use(["c"], 0.5)  # for the rows that name none
    decoder.refresh()
    step(BASE, a, BASE, Applied(("d",)))
    assert decoder.graphs[4, True] is recorded[4, True]
    adapters.add("e", train(base, tmp_path / "e.pth", "lora", seed=5, rank=3))
    step(BASE, a, Applied(("e",)), BASE)
    assert decoder.graphs[4, True] is not recorded[4, True], "it has no room: another form"
    step(c, BASE, a)
    assert decoder.graphs.keys() == {(4, True), (4, False)}, "for three rows, too"


def test_a_chat_on_a_gpu_takes_the_graph_or_the_model_where_it_fails():
    model = random_model(7)
    answers, how = fastest(model, rows=3)
    assert isinstance(answers, GraphedDecoder) and answers.graphs.keys() == {(1, False), (3, False)}
    assert how == "one CUDA graph a token"
    # a number for Python waits for the device
    model.head.register_forward_hook(lambda layer, inputs, x: x * float(x.isfinite().all()))
    answers, how = fastest(model)
    assert type(answers) is TorchDecoder
    assert how.endswith("as a CUDA graph does not work: operation not permitted when stream is capturing")


def test_a_graph_with_other_numbers_is_refused():
    """A hook runs while the graph is recorded, and not when it is replayed."""
    model, calls = random_model(7), []

    def other_when_recorded(layer, inputs, x):
        calls.append(1)
        return x * 1.1 if len(calls) == 4 else x  # call 4 records the second graph

    model.head.register_forward_hook(other_when_recorded)
    decoder = GraphedDecoder(model, 3)
    with pytest.raises(RuntimeError, match="for 3 rows its logits are .* of the largest one off"):
        decoder.check()
    assert len(calls) == 4


@pytest.mark.parametrize("change", ["head", "dtype"])
def test_a_model_with_other_tensors_is_recorded_again(change):
    """As after Adapters.use; until refresh() the graph has the tensors that it was recorded with."""
    model = random_model(7)
    decoder = GraphedDecoder(model, 2, Adapters(model, {}))
    put_prompts(decoder, 2)
    kept = [decoder.take(row) for row in range(2)]
    before = decoder.step([1, 2], [BASE] * 2)
    decoder.refresh()
    assert decoder.graphs, "nothing changed"
    if change == "head":
        model.head.weight = torch.nn.Parameter(2 * model.head.weight)
    else:
        model.to(torch.bfloat16)
    if change == "head":
        for row, state in enumerate(kept):
            decoder.put(row, state)
        assert torch.equal(decoder.step([1, 2], [BASE] * 2), before)
    decoder.refresh()
    assert not decoder.graphs
    for row, state in enumerate(kept):
        decoder.put(row, state)
    plain = TorchDecoder(model, 2)
    for row, state in enumerate(kept):
        plain.put(row, state)
    got = decoder.step([1, 2], [BASE] * 2)
    torch.testing.assert_close(got, plain.step([1, 2], [BASE] * 2))
    assert got.dtype == torch.float32 and decoder.states.att_x.dtype == model.dtype


def test_a_row_that_overflows_does_not_stop_a_recording():
    model = random_model(7)
    decoder = GraphedDecoder(model, 2)
    put_prompts(decoder, 2)
    decoder.states.att_x[:, 1].fill_(torch.inf)
    logits = decoder.step([1, 2], [BASE] * 2)
    assert logits[0].isfinite().all() and not logits[1].isfinite().all()
