"""The replayed token, without a GPU: a stand-in for the graph runs the recorded function again, into the memory of its first result."""

import contextlib

import pytest
import torch

from src import decode, graphed
from src.graphed import GraphedDecoder
from src.model import RWKV

from .conftest import make_arch, random_tensors


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def replayed(monkeypatch):
    """RWKV -> its GraphedDecoder, whose graph is a stand-in on the CPU, and the number of its replays."""

    def make(model):
        decoder, replays = GraphedDecoder(model), []

        class Graph:
            def replay(self):
                replays.append(1)
                for result, new in zip(decoder.result, decoder._token(), strict=True):
                    result.copy_(new)

        for name, stand_in in (("Stream", Stream), ("current_stream", Stream), ("stream", contextlib.nullcontext), ("CUDAGraph", Graph),
                               ("graph", contextlib.nullcontext)):
            monkeypatch.setattr(graphed.torch.cuda, name, stand_in)
        return decoder, replays

    return make


def random_model(version):
    model = RWKV(make_arch(version, n_layer=3)).eval()
    model.load_state_dict(random_tensors(model.arch))
    return model


@pytest.mark.parametrize("version", [6, 7])
def test_tokens_and_states_are_the_models_and_stay_what_they_were(version, replayed):
    model = random_model(version)
    decoder, replays = replayed(model)
    _, state = decoder.next_logits(torch.tensor([[3, 1, 4]]))
    assert not replays, "a prompt is the model's"
    given, other = state, state
    results = [(t, t.clone()) for layer in given for t in layer]
    for token in (1, 5, 9, 1):
        want, state = model.next_logits(torch.tensor([[token]]), state)
        got, other = decoder.next_logits(torch.tensor([[token]]), other)
        torch.testing.assert_close(got, want)
        results += [(t, t.clone()) for t in (got, *(part for layer in other for part in layer))]
        for mine, theirs in zip((t for layer in other for t in layer), (t for layer in state for t in layer), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert len(replays) == 4
    assert all(torch.equal(now, then) for now, then in results)


def test_a_graph_that_fails_is_left_alone(replayed, monkeypatch):
    model = random_model(7)
    decoder, _ = replayed(model)
    decoder.check()
    for block in model.blocks:
        monkeypatch.setattr(block.att, "kernel", "cuda")
    monkeypatch.setattr(decode, "GraphedDecoder", lambda model: decoder)
    monkeypatch.setattr(decoder, "check", lambda: None)
    assert decode.fastest(model) == (decoder, "one CUDA graph a token")

    def fails():
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(decoder, "check", fails)
    answers, how = decode.fastest(model)
    assert answers is model and how.endswith("as a CUDA graph does not work: operation not permitted when stream is capturing")


def test_a_graph_with_other_numbers_is_refused(replayed):
    model = random_model(7)
    decoder, _ = replayed(model)
    token = decoder._token
    decoder._token = lambda: [1.1 * token()[0], *token()[1:]]
    with pytest.raises(RuntimeError, match="of the largest one off"):
        decoder.check()


def test_a_model_with_other_tensors_is_recorded_again(replayed):
    """As after Adapters.use; the parts of the state get the dtype that the model has then."""
    model = random_model(7)
    decoder, replays = replayed(model)
    one = torch.tensor([[1]])
    _, state = decoder.next_logits(torch.tensor([[3, 1, 4]]))
    decoder.next_logits(one, state)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        model.head.weight = torch.nn.Parameter(2 * model.head.weight)
        recorded = decoder.graph
        decoder.refresh()
        assert decoder.graph is None
        _, state = decoder.next_logits(torch.tensor([[3, 1, 4]]))
        got, after = decoder.next_logits(one, state)
        torch.testing.assert_close(got, model.next_logits(one, state)[0])
        assert decoder.graph is not recorded and got.dtype == after[0].att_x.dtype == dtype
