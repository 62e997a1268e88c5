"""Rows of one batch with different adapters: each says what it would say alone, and the base's rows too."""

import functools

import pytest
import torch

import rwkv_miss
from rwkv_miss import UserError
from rwkv_miss.files import mapped
from src.inference.adapters import BASE, Applied
from src.inference.load import load, load_with
from src.inference.torch_decoder import TorchDecoder

from .conftest import close, make_arch, random_tensors
from .test_cpu_decoder import TOLERANCE, some_ids
from .test_live_adapters import SIZES, logits_of, merged_by_hand, train

ROWS = {
    "miss": dict(method="miss", targets=["receptance", "key", "value", "output", "head"]),
    "other": dict(method="miss", rank=7),
    "vera": dict(method="vera"),
    "lora": dict(method="lora", rank=3, targets=["key", "head"], train_parts="state"),
    "state": dict(method="state"),
    "dora": dict(method="dora"),
    "norms": dict(method="miss", train_parts="ln"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """version -> (path of a base, paths of its adapters by name)."""

    @functools.cache
    def write(version):
        folder = tmp_path_factory.mktemp(f"v{version}")
        base = folder / f"base{version}.pth"
        rwkv_miss.write_checkpoint(base, random_tensors(make_arch(version, **SIZES)).items())
        return base, {
            name: train(base, folder / f"{name}.pth", seed=i, **kind)
            for i, (name, kind) in enumerate(ROWS.items())
        }

    return write


@pytest.fixture
def several(files):
    """version -> (path of a base, its Adapters), of every kind."""

    def read(version):
        base, adapters = files(version)
        return base, load_with(base, adapters, "bytes", accelerator="cpu")[0]

    return read


def test_nothing_of_an_adapter_stays_mapped(several, all_mapped):
    """An adapter's file is trained again more often than the base's."""
    base, adapters = several(7)
    in_use = {file.path for file in mapped._mapped if file.is_used}
    assert str(base) in in_use and adapters.by_name.keys() == ROWS.keys()
    assert not in_use & {str(adapter.path) for adapter in adapters.by_name.values()}


REFUSED = {
    Applied(("god",)): "no adapter 'god'; there are: miss, ",
    Applied(("miss", "miss")): r"miss\+miss: one is named twice",
    Applied(("miss",), float("nan")): "the scale of miss is nan",
    Applied(("miss", "dora")): "has no form that differs by row: its method, dora, changes whole",
    Applied(("norms",)): "was trained with --train_parts ln, so it changes whole tensors .*ln0.*and 13 more"
    r".*; .* merge --base \S*base7.pth --adapter \S*norms.pth --out ",
}


def test_what_cannot_differ_by_row_is_refused(several):
    _, adapters = several(7)
    for applied, why in REFUSED.items():
        for refusing in (adapters.check, adapters.factors, adapters.start):
            with pytest.raises(UserError, match=why):
                refusing(applied)
    adapters.use(["dora"])
    adapters.check(BASE)
    with pytest.raises(UserError, match="cannot have miss while the whole model has 'dora'.* merge --base "):
        adapters.check(Applied(("miss",)))


def test_factors_of_a_row_are_those_that_use_chooses(several):
    _, adapters = several(6)
    for applied in (Applied(("miss",), 0.3), Applied(("other", "vera", "lora"), -2.0)):
        rows = adapters.factors(applied)
        assert adapters.factors(BASE) == {}
        adapters.use(*applied)
        in_use = {name: linear.low_rank for name, linear in adapters.linears.items() if linear.low_rank}
        assert rows.keys() == in_use.keys() == adapters.factors(BASE).keys()
        for name, (A, B, scale) in rows.items():
            assert scale == applied.scale == in_use[name].scale and torch.equal(B, in_use[name].B)
            assert (A is None and in_use[name].A is None) or torch.equal(A, in_use[name].A)
        adapters.use()


@pytest.mark.parametrize("version", [6, 7])
def test_a_row_starts_from_the_states_of_its_adapters(version, several):
    """States of one adapter, of two, and of one with factors. Other rows start as the model does."""
    _, adapters = several(version)
    ids = some_ids(adapters.model.arch, 7)
    for names in (["state"], ["state", "lora"]):
        start = adapters.start(Applied(tuple(names), 0.6))
        adapters.use(names, 0.6)
        want = logits_of(adapters.model, ids)
        for name, tensor in adapters.base.items():
            if name.endswith("time_state"):
                assert tensor is None and adapters.model.get_parameter(name) is not None
                adapters.model.get_submodule(name.rpartition(".")[0]).time_state = None
        assert (logits_of(adapters.model, ids) - want).abs().max() > 1e-4
        with torch.no_grad():
            close("logits", adapters.model(ids, start)[0], want, 1e-6)
        adapters.use()
    assert adapters.start(BASE) is None and adapters.start(Applied(("miss",))) is None


# adapters of the rows of a batch: none, one alone, several together, some rows with the same
MIXED = [
    Applied(("miss",)),
    BASE,
    Applied(("other",), 0.7),
    Applied(("lora",), 1.3),
    Applied(("vera", "other", "lora"), -0.4),
    Applied(("miss",), 0.2),
    BASE,
]


@pytest.mark.parametrize("version", [6, 7])
def test_rows_with_different_adapters_say_what_each_says_alone(version, several, tmp_path):
    """Against merged files in float64, each after its own prompt; the base's rows to the bit.

    The tolerance is that of one adapter: the products are the same, summed in another order among zeros.
    """
    base, adapters = several(version)
    model, files = adapters.model, {name: adapter.path for name, adapter in adapters.by_name.items()}
    decoder, plain = (
        TorchDecoder(model, 9, adapters),
        TorchDecoder(load(base, None, "bytes", accelerator="cpu")[0], 9),
    )
    ids = some_ids(model.arch, 40)[0].tolist()
    for row, applied in enumerate(MIXED):
        prompt = torch.tensor([ids[row : 2 * row + 3]])
        for one, its in ((decoder, applied), (plain, BASE)):
            one.put(row, one.read(prompt, one_start(adapters, its), its)[1])
    for tokens in (ids[20:27], ids[27:34]):
        got, of_base = decoder.step(tokens, MIXED), plain.step(tokens, [BASE] * len(MIXED))
    for row, applied in enumerate(MIXED):
        if applied == BASE:
            assert torch.equal(got[row], of_base[row])
            continue
        whole = [*ids[row : 2 * row + 3], ids[20 + row], ids[27 + row]]
        alone = merged_by_hand(base, [files[name] for name in applied.names], tmp_path, applied.scale)
        close(f"row {row}", got[row], logits_of(alone, torch.tensor([whole]))[0, -1], TOLERANCE)
        assert (got[row] - of_base[row]).abs().max() > 1e-2 * of_base.abs().max()


def one_start(adapters, applied):
    return None if applied == BASE else adapters.start(applied)


def test_rows_without_an_adapter_have_what_the_whole_model_has(several):
    _, adapters = several(7)
    model, ids = adapters.model, some_ids(adapters.model.arch, 5).repeat(3, 1)
    adapters.use(["other"], 0.6)
    want = logits_of(model, ids)
    with adapters.rows([BASE, Applied(("lora",), 2.0), Applied(("other",), 0.6)]):
        got = logits_of(model, ids)
    close("the whole model's", got[0], want[0], TOLERANCE)
    assert torch.equal(got[0], got[2]) and (got[1] - got[0]).abs().max() > 1e-2
    assert torch.equal(logits_of(model, ids), want), "the choice of before is back"
    adapters.use(["dora"])
    with pytest.raises(UserError, match="cannot have miss"), adapters.rows([BASE, Applied(("miss",))]):
        pass


def test_adapters_come_and_go_while_others_are_in_use(several, tmp_path):
    """A new adapter takes the place of an unused one of its form: recorded addresses stay. Or a new place."""
    base, adapters = several(7)
    model, ids = adapters.model, some_ids(adapters.model.arch, 5).repeat(2, 1)
    paths = {name: adapter.path for name, adapter in adapters.by_name.items()}

    def logits(*names):
        with adapters.rows([Applied((name,), 0.9) for name in names]):
            return logits_of(model, ids)

    before = logits("other", "lora")
    stack = adapters.stack
    again = train(base, tmp_path / "again.pth", "miss", seed=77, rank=7)
    adapters.drop("other")
    adapters.add("again", again)
    with pytest.raises(UserError, match="no adapter 'other'"):
        logits("other", "lora")
    now = logits("again", "lora")
    assert adapters.stack is stack and stack.names == ["again", "lora"]
    assert torch.equal(now[1], before[1]) and (now[0] - before[0]).abs().max() > 1e-2
    close("the new one", now[0], logits_of(merged_by_hand(base, [again], tmp_path, 0.9), ids)[0], TOLERANCE)
    adapters.add("other", paths["other"])
    wide = logits("other", "again")
    assert adapters.stack is not stack and {*adapters.stack.names} == {"other", "again"}
    close("with the new one", wide[0], before[0], TOLERANCE)
    adapters.drop("again")
    adapters.add("again", paths["other"])
    close("another of the same name", logits("other", "again")[1], before[0], TOLERANCE)
    adapters.use(["lora"])
    with pytest.raises(UserError, match="has adapter 'lora' in use"):
        adapters.drop("lora")
    with pytest.raises(UserError, match="an adapter 'lora' already"):
        adapters.add("lora", again)
