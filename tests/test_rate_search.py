"""The search for a learning rate: it finds the valley, and it changes nothing of the run."""

import contextlib
import dataclasses
import functools
import json
import math
import threading
import types

import pytest
import torch
import yaml

from rwkv_miss import METHODS, UserError
from src.config import AUTO, Config, parse
from src.objectives.kinds import objective_of
from src.planning import plan
from src.planning.defaults import TRIAL_STEPS, TRIAL_WARM_UP, first_guess
from src.planning.plan import Device, no_search
from src.training import rate_search
from src.training.optimizer import learning_rate_factor
from src.training.rate_search import (
    RateSearch,
    as_json,
    best_of,
    enclose,
    found_of,
    reason,
    recorded_search,
    rung,
    search_table,
)
from src.training.short_runs import ALONE, Trial

from . import program
from .conftest import make_arch, random_tensors, slow
from .program import interrupt, losses, succeed

WRITTEN = (
    "adapter.pth",
    "learning_rate.json",
    "run.json",
    "checkpoints",
)  # what a search without end leaves out


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random base over bytes, and conversations to train on."""
    folder = tmp_path_factory.mktemp("search")
    torch.save(random_tensors(make_arch(7, vocab_size=256)), folder / "base.pth")
    rows = [{"instruction": f"q{n}", "output": "ab c" * (1 + n % 3)} for n in range(120)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags(files, proj_dir, *more):
    """A run of 100 steps, the shortest that has a search."""
    return [
        *("--load_model", str(files / "base.pth"), "--data_file", str(files / "data.jsonl")),
        *("--proj_dir", str(proj_dir), "--tokenizer", "bytes", "--data_cache", "none"),
        *("--accelerator", "cpu", "--ctx_len", "64", "--epoch_steps", "100", "--eval_samples", "0"),
        *("--eval_split", "0.05"),
        *more,
    ]


def train(files, proj_dir, *more):
    return succeed(program.run(flags(files, proj_dir, "--global_bsz", "2", *more)))


def search(proj_dir):
    return json.loads((proj_dir / "learning_rate.json").read_text())


def settings(proj_dir):
    return yaml.safe_load((proj_dir / "config.yaml").read_text())


def valley(bottom):
    """A loss over the logarithm of the rate that is lowest at `bottom`."""
    return lambda rate: (math.log10(rate) - math.log10(bottom)) ** 2


def test_the_rates_are_1_and_3_of_every_decade():
    assert [rung(k) for k in range(-7, 3)] == [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1, 3, 10]


@pytest.mark.parametrize(
    "bottom, first, tried",
    [
        (1e-3, 1.1e-3, [3e-4, 1e-3, 3e-3]),
        (1e-3, 3e-3, [3e-4, 1e-3, 3e-3, 1e-2]),
        (3e-2, 2.8e-3, [1e-3, 3e-3, 1e-2, 3e-2, 0.1]),
        (1e-5, 1e-2, [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]),  # 7 are the most
        (10.0, 1e-2, [3e-3, 1e-2, 3e-2, 0.1, 0.3, 1, 3]),
    ],
)
def test_the_trials_go_to_the_better_side_until_the_best_is_enclosed(bottom, first, tried):
    assert list(enclose(valley(bottom), first, 7)) == tried


def test_a_rate_below_is_tried_though_the_loss_falls_again_above():
    """As it was after 15 steps on 1,000 dates: the run knew the weekdays at 0.003 and not at 0.03."""
    losses = {1e-3: 0.80, 3e-3: 0.26, 1e-2: 0.42, 3e-2: 0.41}
    assert best_of(enclose(losses.__getitem__, 6.4e-3, 7)) == 3e-3


def test_a_side_where_all_diverge_is_left():
    def diverges(rate):
        return math.inf if rate > 1e-4 else valley(3e-5)(rate)

    assert list(enclose(diverges, 1e-3, 7)) == [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]


@pytest.mark.parametrize(
    "method, published", [("miss", 2e-5), ("lora", 2e-4), ("pissa", 2e-5), ("dora", 2e-4), ("none", 1e-5)]
)
def test_the_first_guess_is_near_the_published_rate_for_the_models_that_it_was_published_for(
    method, published
):
    """7B: 32 layers of 4096. Within a factor of 2.5, as the ones for small models were fitted."""
    config = parse(["--load_model", "x", "--data_file", "x", "--peft", method])
    if method != "none":
        config = dataclasses.replace(config, peft_config={"rank": 64})
    large = first_guess(config, make_arch(7, n_layer=32, n_embd=4096, head_size=64))
    assert published / 2.5 < large < published * 2.5
    assert first_guess(config, make_arch(7, n_layer=12, n_embd=768, head_size=64)) > 2 * large


@pytest.mark.parametrize("method", [*METHODS, "none"])
def test_every_method_has_a_first_guess(method):
    config = parse(["--load_model", "x", "--data_file", "x", "--peft", method])
    assert 1e-4 < first_guess(config, make_arch(7)) <= 1


def test_a_new_model_gets_the_published_rate():
    config = Config(peft="none", n_layer=2, n_embd=64, version="x070")
    assert first_guess(config, make_arch(7)) == config.published_rate == 6e-4


class Rows:
    """A schedule with this number of steps in a pass."""

    def __init__(self, steps_per_pass):
        self.steps_per_pass = steps_per_pass


@pytest.mark.parametrize(
    "settings, steps, memory, words",
    [
        ({}, 99, 100, "99 steps are too few"),
        ({}, 100, 1, ""),
        ({"strategy": "deepspeed_stage_3", "devices": 2}, 100, 100, "no process has the whole model"),
        ({"strategy": "deepspeed_stage_2_offload"}, 100, 70, "a trial needs 77 bytes"),
        ({"strategy": "deepspeed_stage_2_offload"}, 100, 100, ""),
        ({"peft": "none"}, 100, 100, "a trial needs 117 bytes"),
        ({"peft": "none"}, 100, 200, ""),
    ],
)
def test_where_no_search_is_possible_it_is_said_why(monkeypatch, settings, steps, memory, words):
    monkeypatch.setattr(plan, "estimate", lambda config, *_: {"trained": 40.0, config.strategy: 37.0})
    monkeypatch.setattr(plan, "memory_of", lambda device, world: memory)
    monkeypatch.setattr(plan, "USABLE", 1.0)
    monkeypatch.setattr(plan, "size_text", lambda size: f"{size:g} bytes")
    config = Config(**settings, epoch_count=1)
    found = no_search(config, None, Device("cpu", "fp32", "", "cpu", ""), Rows(steps))
    assert words in found and bool(words) == bool(found)


@pytest.mark.parametrize(
    "more",
    [
        ["--peft_config", "r=7", "--train_parts", "ln,state", "--accumulate_grad_batches", "2"],
        slow(["--peft", "lora", "--peft_config", "r=4,dropout=0.2", "--weight_decay", "0.1"]),
        slow(["--peft", "adalora", "--peft_config", "r=4"]),
        slow(["--peft", "state", "--chunk_ctx", "16"]),
        slow(["--peft", "none", "--precision", "bf16"]),
        slow(["--peft", "pissa", "--peft_config", "r=4", "--eval_split", "0", "--quant", "nf4"]),
    ],
    ids=lambda more: " ".join(more[:2]),
)
def test_the_run_equals_one_that_was_given_the_rate(files, tmp_path, more):
    """Digit for digit: losses and everything that is written of the trained tensors."""
    found, given = tmp_path / "found", tmp_path / "given"
    output = train(files, found, *more)
    rate = settings(found)["lr_init"]
    assert search(found)["rate"] == rate and f"lr {rate:g}: {search(found)['reason']}" in output
    train(files, given, *more, "--lr_init", str(rate))
    assert not (given / "learning_rate.json").exists()
    assert losses(found) == losses(given) and len(losses(found)) == 100
    name = "model.pth" if "none" in more else "adapter.pth"
    trained = [torch.load(folder / name, weights_only=True) for folder in (found, given)]
    assert trained[0].keys() == trained[1].keys()
    for key, tensor in trained[0].items():
        if torch.is_tensor(tensor):
            assert torch.equal(tensor, trained[1][key]), key


def note_own_rate(folder, rank):
    """Have this rank write down the rate that it finds by itself, before rank 0's is taken."""
    found_by_all = rate_search.found_of

    def noted(*args):
        result = found_by_all(*args)
        (folder / f"rank-{rank}").write_text(repr(result.rate))
        return result

    rate_search.found_of = noted


@pytest.mark.parametrize("strategy", [slow("ddp"), slow("deepspeed_stage_2")])
def test_several_processes_find_the_same_rate(files, tmp_path, strategy):
    """Each by itself; and the losses of their trials are those of one process.

    Of the warm-up alone: at the highest rate the roundings of a step grow in the steps after it.
    """
    more = ["--global_bsz", "2", "--devices", "2", "--strategy", strategy, "--micro_bsz", "1"]
    sabotage = functools.partial(note_own_rate, tmp_path)
    output = succeed(program.run(flags(files, tmp_path / "two", *more), sabotage))
    train(files, tmp_path / "one", "--micro_bsz", "2")
    two, one = search(tmp_path / "two"), search(tmp_path / "one")
    assert output.count(two["reason"]) == 1
    assert [float((tmp_path / f"rank-{rank}").read_text()) for rank in (0, 1)] == [two["rate"]] * 2
    assert [trial["rate"] for trial in two["trials"]] == [trial["rate"] for trial in one["trials"]]
    for mine, theirs in zip(two["trials"], one["trials"], strict=True):
        assert mine["losses"][:TRIAL_WARM_UP] == pytest.approx(theirs["losses"][:TRIAL_WARM_UP], rel=1e-4)
    assert two["rate"] == pytest.approx(one["rate"], rel=0.1)
    assert settings(tmp_path / "two")["lr_init"] == two["rate"]


def test_training_rows_that_decide_have_a_trained_token():
    """Of three rows the last one alone has one, and a step reads a row."""
    documents = types.SimpleNamespace(take=lambda chosen: chosen.tolist())
    data = types.SimpleNamespace(evaluated=None, documents=documents)
    schedule = types.SimpleNamespace(
        rows=[[0], [1], [2]], step_rows=lambda step: [step % 3], step_targets=lambda step: step % 3 == 2
    )
    assert RateSearch._deciding(None, types.SimpleNamespace(schedule=schedule, data=data)) == [2]


@pytest.mark.slow
def test_a_resumed_run_searches_never_again(files, tmp_path):
    run = tmp_path / "run"
    train(files, run)
    before, card = search(run), (run / "run_card.md").read_text()
    output = train(files, run, "--epoch_steps", "110", "--resume", "auto")
    assert f"as the run has it so far: {before['reason']}" in output, (
        "where the rate is from is not forgotten"
    )
    assert search_table(before)[0] not in output and search(run) == before and len(losses(run)) == 110
    assert settings(run)["lr_init"] == before["rate"]
    table = search_table(before)
    for text in (card, (run / "run_card.md").read_text(), (run / "config.yaml").read_text()):
        assert all(line in text for line in table)


def found(losses, before=3.0):
    """Make the result of a search whose trials at 1, 3, 10, ... end with these losses."""
    done = [Trial(rung(k), [3.0], loss) for k, loss in enumerate(losses)]
    tried = {one.rate: math.inf if one.deciding_loss is None else one.deciding_loss for one in done}
    return found_of(tried, done, 1.0, before, 5.0, "held-out")


def test_the_table_has_a_line_for_each_trial_and_says_what_diverged():
    table = search_table(as_json(found((3, 2, 1.5, 1, 2, 3.5, None))))
    assert len(table) == 8 and "Held-out loss 3.0000 before, and after 15 steps" in table[0]
    assert [line.count("#") for line in table[1:]] == [0, 10, 15, 20, 10, 0, 0]
    assert "diverged" in table[-1] and search_table(None) == []


def test_the_best_rate_is_taken_and_a_valley_that_is_not_enclosed_is_said():
    inside, at_end = found((3.0, 1.0, 3.0)), found((3.0, 2.0, 1.0))
    assert (inside.rate, at_end.rate) == (3.0, 10.0)
    assert reason(inside) == "the lowest loss of 3 trials before step 1"
    assert reason(at_end).endswith("the best is the last rate that was tried, and one beyond may be better")


def test_a_loss_before_the_training_that_is_not_finite_is_said():
    table = search_table(as_json(found((3.0, 1.0, 3.0), before=None)))
    assert "Held-out loss not finite" in table[0] and "#" not in "".join(table[1:])


def test_a_run_whose_trials_all_diverge_ends_before_its_first_step(files, tmp_path):
    tensors = torch.load(files / "base.pth")
    tensors["head.weight"].fill_(1e38)  # finite itself
    torch.save(tensors, tmp_path / "broken.pth")
    code, output = program.run(flags(files, tmp_path / "run", "--load_model", str(tmp_path / "broken.pth")))
    assert code == 2 and "no rate from " in output and "has a finite loss after 15 steps" in output, output
    assert not any((tmp_path / "run" / name).exists() for name in WRITTEN)


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "learning_rate.json").write_text('{"trials": [')
    with pytest.raises(UserError, match=r"learning_rate.json is damaged .*; remove it"):
        recorded_search(str(tmp_path))
    assert recorded_search(str(tmp_path / "absent")) is None


def test_nothing_held_out_leaves_the_training_loss_to_decide(files, tmp_path):
    output = train(files, tmp_path, "--eval_split", "0", "--verbose")
    assert search(tmp_path)["loss_of"] == "training" and "Training loss" in output
    assert output.count("\ntrial      rate ") == len(search(tmp_path)["trials"])


def test_a_short_run_takes_the_first_guess_and_says_so(files, tmp_path):
    output = train(files, tmp_path, "--epoch_steps", "5")
    config = parse(flags(files, tmp_path))
    guess = first_guess(dataclasses.replace(config, peft_config={"rank": 6}), make_arch(7, vocab_size=256))
    assert settings(tmp_path)["lr_init"] == guess and f"lr {guess:g} to" in output
    assert "first guess from method, rank and widths" in output and "5 steps are too few" in output
    assert not (tmp_path / "learning_rate.json").exists()


def interrupt_the_second_trial(rank):
    """Ctrl-C a moment after the first one is told."""
    text = rate_search.trial_text

    def told(*trial):
        threading.Timer(0.02, interrupt).start()
        return text(*trial)

    rate_search.trial_text = told


def test_ctrl_c_ends_a_search_at_once(files, tmp_path):
    words = flags(files, tmp_path, "--micro_bsz", "64", "--verbose")
    code, output = program.run(words, interrupt_the_second_trial)
    assert code == 130 and "interrupted before the first step" in output, output
    assert output.count("\ntrial      rate ") <= 2, "the search went on"
    assert not any((tmp_path / name).exists() for name in WRITTEN)


def test_words_for_rates():
    base = ["--load_model", "x", "--data_file", "x"]
    for more, rate, origin in (
        ([], AUTO, "default"),
        (["--lr_init", "auto"], AUTO, "command line"),
        (["--lr_init", "paper"], 2e-5, "command line: the published rate of --peft miss"),
        (["--lr_init", "paper", "--peft", "lora"], 2e-4, "command line: the published rate of --peft lora"),
        (["--lr_init", "paper", "--peft", "none"], 1e-5, "command line: the published rate of --peft none"),
        (["--preset", "paper-table7"], 2e-5, "preset paper-table7"),
        (["--lr_init", "3e-4"], 3e-4, "command line"),
    ):
        config = parse([*base, *more])
        assert (config.lr_init, config.origin_of("lr_init")) == (rate, origin)
    with pytest.raises(UserError, match="--lr_init much: expected a number such as 0.5 or auto or paper"):
        parse([*base, "--lr_init", "much"])
    with pytest.raises(UserError, match="--lr_init -1"):
        parse([*base, "--lr_init", "-1"])


@pytest.mark.parametrize(
    "kind, sft_weight, judged", [("dpo", 0.0, 1.0), ("simpo", 0.1, 1.0), ("ipo", 2.0, 2.0)]
)
def test_the_right_answers_count_between_rates(kind, sft_weight, judged):
    """A preference alone is the smaller the higher the rate, also where they get lost."""
    config = Config(loss=kind, sft_weight=sft_weight, lr_init=0.125, beta=0.5)
    assert objective_of(config).judged_by().config == dataclasses.replace(config, sft_weight=judged)
    assert objective_of(Config()).judged_by().config == Config(), "supervised training has nothing else"


def test_a_search_judges_with_the_chosen_answers_and_trains_without(monkeypatch):
    """What a trial trains is the run's, what is looked at after it has the cross entropy."""
    trained, judged = [], []

    def train(model, config, documents, steps, processes):
        trained.append(config)
        yield 1.0

    def trial_of(model, objective, rate, losses, documents, processes):
        judged.append(objective.config.sft_weight)
        return Trial(rate, losses, valley(1e-3)(rate) if rate else 3.0)

    monkeypatch.setattr(rate_search, "train", train)
    monkeypatch.setattr(rate_search, "trial_of", trial_of)
    monkeypatch.setattr(rate_search, "put_back", lambda model: contextlib.nullcontext())
    search = object.__new__(RateSearch)
    search.config, search.guess = Config(loss="dpo", sft_weight=0.0), 1e-3
    monkeypatch.setattr(search, "_deciding", lambda module: [])
    module = types.SimpleNamespace(model=None, data=types.SimpleNamespace(documents=[], evaluated=[1]))
    found = search._search(module, ALONE, False)
    assert {tried.sft_weight for tried in trained} == {0.0} and set(judged) == {1.0}
    assert len(judged) == len(trained) + 1 == len(found.trials) + 1
    for tried in trained:  # Adam's first steps would throw the model off at a full rate
        factors = list(map(learning_rate_factor(tried, tried.lr_init, TRIAL_STEPS), range(TRIAL_STEPS)))
        assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * (TRIAL_STEPS - 4))
    first = search_table(as_json(found))[0]
    assert "Held-out dpo and cross-entropy loss 3.0000 before, and after 15 steps" in first


def test_a_preference_alone_begins_lower():
    arch, alone = (
        make_arch(7),
        Config(load_model="base.pth", loss="dpo", sft_weight=0.0, peft_config={"r": 4}),
    )
    guess = first_guess(dataclasses.replace(alone, loss="sft"), arch)
    assert first_guess(dataclasses.replace(alone, sft_weight=1.0), arch) == guess
    assert first_guess(alone, arch) == pytest.approx(guess / 20, rel=0.05)
