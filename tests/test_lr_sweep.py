"""The sweep of learning rates: its trainings are train.py's, start alike, and what it prints and writes is
whole.
"""

import contextlib
import dataclasses
import json
import math
import shlex

import pytest
import torch

import rwkv_miss
from rwkv_miss import UserError
from scripts import lr_sweep
from src.config import Config
from src.data.dataset import load_documents
from src.data.tokenizer import load_tokenizer
from src.model import RWKV
from src.planning.defaults import chosen_rate
from src.sources import source_of
from src.training import short_runs
from src.training.optimizer import learning_rate_factor
from src.training.short_runs import Trial, train, trials

from . import program
from .conftest import make_arch, random_tensors, read_rows, save_base, slow, write_rows
from .program import losses
from .tables import talk


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random base over bytes, conversations to train on and others to hold out."""
    folder = tmp_path_factory.mktemp("sweep")
    save_base(folder / "base.pth")
    for name, numbers in (("data", range(20)), ("other", range(30, 36))):
        rows = [talk(f"q{n}", "ab c" * (1 + n % 3)) for n in numbers]
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def flags(files, proj_dir, *more):
    return [
        *f"""
            --load_model {files}/base.pth --data_file {files}/data.jsonl --eval_file {files}/other.jsonl
            --proj_dir {proj_dir} --tokenizer bytes --accelerator cpu --micro_bsz 2 --data_cache none
        """.split(),
        *more,
    ]


def sweep(*arguments):
    return lr_sweep.sweep(*lr_sweep.parse(list(arguments)))


def results(proj_dir):
    assert {path.name for path in proj_dir.iterdir()} >= {"lr_sweep.json", "lr_sweep.png"}
    assert not list(proj_dir.glob("*.tmp"))
    assert (proj_dir / "lr_sweep.png").read_bytes()[:4] == b"\x89PNG"
    return json.loads((proj_dir / "lr_sweep.json").read_text())


@pytest.mark.parametrize(
    "more",
    [
        """
            --peft lora --peft_config r=7,dropout=0.2 --accumulate_grad_batches 2 --weight_decay 0.1
            --warmup_steps 2 --train_parts ln,state --lr_map ffn=3
        """.split(),
        slow(["--peft", "none", "--chunk_ctx", "16", "--grad_clip", "0.1"]),
        slow(["--precision", "fp16", "--peft_config", "r=7"]),
    ],
)
def test_the_command_it_prints_gives_the_losses_that_it_saw(files, tmp_path, capsys, more):
    run = tmp_path / "run"
    assert sweep(*flags(files, run, *more, "--epoch_steps", "5", "--rates", "1e-3,1e-5")) == 0
    found = results(run)
    assert found["steps"] == 5 and [trial["rate"] for trial in found["trials"]] == [1e-5, 1e-3]
    *_, note, shortened, command = (printed := capsys.readouterr().out).splitlines()
    assert "holds a run already" not in printed
    assert "highest rate tried" in note and "1e-3" not in command and command == found["command"]
    # the command is that of a whole run, whatever made the sweep short
    assert "--epoch_steps 5 made the sweep short" in shortened and "epoch_steps" not in command
    words = [*shlex.split(command), "--epoch_steps", "5"]
    assert words[:2] == ["python", "train.py"] and found["best"] == 1e-3
    output = program.succeed(program.run([*words[2:], "--eval_docs", "99"]))
    best = found["trials"][1]

    # a sweep leaves the run of its folder alone, and says that the command needs another folder
    def times():
        files = [path for path in run.rglob("*") if path.is_file() and "lr_sweep" not in path.name]
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    assert sweep(*flags(files, run, *more, "--epoch_steps", "5", "--rates", "1e-3")) == 0
    assert f"note       {run} holds a run already" in capsys.readouterr().out and times() == before
    # one machine ran both; where the held-out rows fall into other batches only the order of a sum differs
    assert losses(run) == pytest.approx(best["losses"], rel=1e-6), output
    validation = [line["loss"] for line in read_rows(run / "validation.jsonl")]
    assert validation == pytest.approx([found["held_out_before"], best["held_out"]], rel=1e-6)


@pytest.mark.parametrize("method", [*rwkv_miss.METHODS])
def test_every_rate_starts_from_the_same_adapter(files, method):
    torch.manual_seed(0)
    model = RWKV(make_arch(7, vocab_size=256))
    model.load_state_dict(random_tensors(model.arch))
    rwkv_miss.inject(
        model, method, **({"rank": 6} if hasattr(rwkv_miss.METHODS[method].Options(), "rank") else {})
    )
    config = Config(peft=method, micro_bsz=4, ctx_len=64, lr_schedule="cos").settled()
    documents, other = (
        load_documents(files / f"{name}.jsonl", load_tokenizer("bytes", 256), 64)
        for name in ("data", "other")
    )
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    start = {name: tensor.clone() for name, tensor in tensors.items()}
    rates = [1e-2, 1e-3]
    together = list(trials(model, source_of(config), documents, other, 2, "lr_init", rates))
    assert all(torch.equal(start[name], tensor) for name, tensor in tensors.items())
    alone = next(trials(model, source_of(config), documents, other, 2, "lr_init", rates[1:]))
    assert together[1] == alone and together[0].losses[0] == alone.losses[0]
    assert together[0].losses[1:] != alone.losses[1:]


@pytest.mark.parametrize(
    "more, steps, factor",
    [
        (["--steps", "40"], 40, 1 / 2),
        (["--steps", "10"], 10, 1),
        (["--steps", "40", "--warmup_steps", "4"], 40, 1 / 4),
        ([], 600, 1 / 30),
        (["--epoch_steps", "601"], 600, 1 / 30),
    ],
)
def test_the_warm_up_is_a_share_of_each_training_and_the_command_leaves_it_to_the_run(
    files, tmp_path, monkeypatch, more, steps, factor
):
    trained = []

    def no_training(model, source, documents, held_out, count, setting, rates):
        trained.append((count, learning_rate_factor(source.config, 1.0, count)(0)))
        return [Trial(rate, [3.0, 2.0], 0.1) for rate in rates]

    monkeypatch.setattr(lr_sweep, "trials", no_training)
    assert sweep(*flags(files, tmp_path, "--peft_config", "r=7", "--rates", "1e-3", *more)) == 0
    assert trained == [(steps, pytest.approx(factor))]
    command = results(tmp_path)["command"]
    kept_flags = [flag for flag in more if flag.startswith("--") and flag != "--steps"]
    schedule = ("--warmup_steps", "--epoch_count", "--epoch_steps", "--eval_steps", "--early_stop")
    assert [flag for flag in schedule if flag in command] == kept_flags


def test_a_rate_that_diverges_is_said_and_not_chosen(files, tmp_path, capsys):
    sweep_flags = "--peft_config r=7 --steps 6 --rates 1e-2,1e30,3e-3".split()
    assert sweep(*flags(files, tmp_path / "run", *sweep_flags)) == 0
    found = results(tmp_path / "run")
    slow, best, diverged = found["trials"]
    assert best["held_out"] < slow["held_out"] < found["held_out_before"] and found["best"] == 1e-2
    assert [trial["diverged"] for trial in found["trials"]] == [False, False, True]
    assert diverged["losses"] == [slow["losses"][0], None] and diverged["held_out"] is None
    assert "diverged: not finite after 2 steps" in capsys.readouterr().out
    assert (
        sweep(*flags(files, tmp_path / "bad", "--peft_config", "r=7", "--steps", "6", "--rates", "1e30")) == 1
    )
    assert results(tmp_path / "bad")["command"] is None
    assert (
        "no rate is better than not training; try lower ones: --rates 1e+30,3.2e+29,"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "losses, held_out, words",
    [
        ([3.0, 2.0], 2.5, ""),
        ([3.0, 2.0], 3.5, "worse than before"),
        ([3.0, 4.0], 3.5, "diverged: both losses rose"),
        ([3.0, math.nan], None, "diverged: not finite after 2 steps"),
    ],
)
def test_what_is_wrong_with_a_training_is_said(losses, held_out, words):
    assert lr_sweep.verdict(Trial(1e-3, losses, held_out), before=3.0) == words


def test_the_rate_of_the_initial_state_alone(files, tmp_path):
    sweep_flags = (
        "--peft_config r=7 --train_parts state --setting state_lr --steps 2 --rates 1e-2,1e-1".split()
    )
    assert sweep(*flags(files, tmp_path, *sweep_flags)) == 0
    found = results(tmp_path)
    assert found["setting"] == "state_lr" and f"--state_lr {found['best']:g}" in found["command"]
    assert "lr_init" not in found["command"]
    first, second = found["trials"]
    assert first["losses"][0] == second["losses"][0] and first["losses"][1] != second["losses"][1]


def test_the_grid_is_around_the_rate_that_a_run_would_take(files, tmp_path):
    assert lr_sweep.grid(2e-5) == [6e-7, 2e-6, 6e-6, 2e-5, 6e-5, 2e-4, 6e-4]
    guess = chosen_rate(Config(load_model="base.pth", peft_config={"rank": 2}), make_arch(7, vocab_size=256))
    given = (["--lr_init", "1e-4"], 1e-4), (["--lr_init", "paper"], 2e-5)
    for more, centre in (([], guess), *given):
        sweep(*flags(files, tmp_path, *more, "--peft_config", "r=2", "--steps", "1"))
        assert [trial["rate"] for trial in results(tmp_path)["trials"]] == lr_sweep.grid(centre)


@pytest.mark.parametrize(
    "more, words",
    [
        (["--rates", "1e-3,much"], "--rates 1e-3,much: expected learning rates above 0"),
        (["--rates", "0"], "above 0"),
        (["--rates", "nan"], "above 0"),
        (["--steps", "-1"], "must not be negative"),
        (["--setting", "state_lr"], "is for --train_parts state"),
        (["--devices", "2"], "one process"),
        (["--loss", "grpo"], "--loss grpo has no sweep"),
        (["--eval_split", "0", "--eval_file", ""], "there are none"),
        (["--warmup_steps", "5", "--steps", "5"], "no step at its full rate"),
        (["--load_model", "absent.pth"], "absent.pth"),
        (["--rate", "1"], "unknown flag --rate"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(files, tmp_path, more, words):
    with pytest.raises(UserError, match=words):
        sweep(*flags(files, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_a_training_ends_at_a_loss_that_is_not_finite(files):
    model = RWKV(make_arch(7, vocab_size=256))
    model.load_state_dict(random_tensors(model.arch))
    rwkv_miss.inject(model, rank=4)
    documents = load_documents(files / "data.jsonl", load_tokenizer("bytes", 256), 64)
    with torch.no_grad():
        model.ln_out.weight.fill_(float("nan"))
    config = Config(micro_bsz=4, ctx_len=64, lr_init=1e-3, lr_schedule="cos").settled()
    losses = list(train(model, source_of(config), documents, 5))
    assert len(losses) == 1 and math.isnan(losses[0])


@pytest.mark.parametrize(
    "kind, sft_weight, judged", [("dpo", 0.0, 1.0), ("simpo", 0.1, 1.0), ("ipo", 2.0, 2.0)]
)
def test_the_right_answers_count_between_rates(kind, sft_weight, judged):
    """A preference alone is the smaller the higher the rate, also where they get lost."""
    config = Config(loss=kind, sft_weight=sft_weight, lr_init=0.125, beta=0.5)
    source = source_of(config)
    options = dataclasses.replace(source.loss.options, sft_weight=judged)
    assert short_runs.judge_of(source).loss.options == options
    documents = source_of(Config())
    assert short_runs.judge_of(documents).loss is documents.loss, "supervised training has nothing else"


def test_a_preference_is_judged_with_the_chosen_answers_too(monkeypatch):
    """The training keeps the run's weight."""
    seen = []

    def weight(source):
        return source.loss.options.sft_weight

    monkeypatch.setattr(short_runs, "train", lambda model, source, *_: iter([weight(source)]))
    monkeypatch.setattr(short_runs, "held_out_loss", lambda _, judge, *__: seen.append(weight(judge)) or 2.0)
    monkeypatch.setattr(short_runs, "put_back", lambda model: contextlib.nullcontext())
    config = Config(loss="dpo", sft_weight=0.0)
    [trial] = trials(None, source_of(config), [], [], 1, "lr_init", [1e-3])
    assert trial == Trial(1e-3, [0.0], 2.0)
    assert seen == [1.0]


def test_a_base_that_gives_no_finite_loss_is_refused(files, tmp_path):
    tensors = random_tensors(make_arch(7, vocab_size=256))
    tensors["head.weight"].fill_(1e38)  # finite itself
    torch.save(tensors, tmp_path / "broken.pth")
    with pytest.raises(
        UserError, match="the loss on the held-out documents is (nan|inf) before any training"
    ):
        sweep(*flags(files, tmp_path / "run", "--load_model", str(tmp_path / "broken.pth"), "--steps", "1"))
    assert not (tmp_path / "run").exists()
