"""Training as a user runs it: one process, many, interrupted and resumed, all to the same losses."""

import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml

import rwkv_miss
from rwkv_miss import read_metadata
from rwkv_miss.__main__ import main as rwkv_miss_main
from rwkv_miss.files import model_files
from rwkv_miss.files.identity import fingerprint
from rwkv_miss.progress import Progress
from src.config import Config
from src.losses.metrics import SUPERVISED
from src.model import RWKV, read_model_file
from src.training import callbacks, trainer
from src.training.callbacks import StepReport
from src.training.resume import earlier_settings

from . import program
from .conftest import ROOT, close, pypi_rwkv, save_base, slow, write_rows
from .program import losses, succeed
from .tables import talk


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Random v6 and v7 bases over bytes, and 21 conversations with very unequal answers."""
    folder = tmp_path_factory.mktemp("training")
    for version in (6, 7):
        save_base(folder / f"v{version}.pth", version)
    rng = random.Random(0)
    rows = [talk("q" * rng.randint(1, 30), "ab c" * rng.choice([1, 1, 15])) for _ in range(21)]
    write_rows(folder / "data.jsonl", rows)
    return folder


def command(files, proj_dir, *flags, version=7):
    base = (
        ["--load_model", str(files / f"v{version}.pth"), "--peft_config", "r=7"]
        if "none" not in flags
        else []
    )
    common = f"""
        --data_file {files}/data.jsonl --proj_dir {proj_dir} --tokenizer bytes --lr_init 1e-2 --micro_bsz 8
        --packing 0 --accelerator cpu --eval_split 0
    """
    return [sys.executable, "train.py", *base, *common.split(), *flags]


def train(*args, **kwargs):
    return succeed(program.run(command(*args, **kwargs)[2:]))


@pytest.fixture(scope="module")
def plain(files, tmp_path_factory):
    """The run that all others must equal: one process, whole batches, 2 passes of 3 steps, the last short."""
    proj_dir = tmp_path_factory.mktemp("plain") / "run"
    output = train(files, proj_dir, "--epoch_count", "2")
    return proj_dir, output


def test_a_run_prints_its_plan_and_leaves_its_files(plain, files):
    proj_dir, output = plain
    assert "RWKV-7, 2 layers, width 48" in output and "12 matrices" in output and "21 documents" in output
    assert "6 steps of 8 rows" in output and "«" in output
    assert "wkv cpu" in (proj_dir / "run_card.md").read_text()
    left = {p.name for p in proj_dir.iterdir()} - {"tensorboard"}
    written = "adapter.pth config.yaml metrics.jsonl run.json loss.png run_card.md README.md checkpoints"
    assert left == set(written.split())
    metadata = read_metadata(proj_dir / "adapter.pth")
    assert (metadata["method"], metadata["step"], metadata["tokenizer"], metadata["template"]) == (
        "miss",
        6,
        "bytes",
        "rwkv:hermes",
    )
    assert metadata["base_fingerprint"] == RWKV.load(files / "v7.pth").base_fingerprint
    curve = losses(proj_dir)
    assert len(curve) == 6 and curve[-1] < 0.9 * curve[0]
    assert yaml.safe_load((proj_dir / "config.yaml").read_text())["micro_bsz"] == 8


def print_readings(rank):
    """Print the path of each checkpoint that the process reads."""
    load_dict = model_files.load_dict

    def load(path):
        print(f"reads {path}", flush=True)
        return load_dict(path)

    model_files.load_dict = load


def test_a_run_reads_its_base_once(files, tmp_path):
    """From the plan to the digest in the adapter's file."""
    output = succeed(program.run(command(files, tmp_path, "--epoch_steps", "1")[2:], print_readings))
    assert output.count(f"reads {files}/v7.pth\n") == 1
    assert read_metadata(tmp_path / "adapter.pth")["base_fingerprint"] == fingerprint(
        read_model_file(files / "v7.pth")
    )


def test_documents_in_shared_rows_train_the_same(files, tmp_path):
    """All 21 documents in every step, in rows of their own and in shared ones: the same losses."""
    train(files, tmp_path / "own", "--epoch_count", "4", "--micro_bsz", "21")
    packed = ["--epoch_count", "4", "--packing", "1", "--ctx_len", "150"]
    output = train(files, tmp_path / "shared", *packed)
    assert "rows of 150 tokens" in output
    curve = losses(tmp_path / "own")
    assert len(curve) == 4
    assert losses(tmp_path / "shared") == pytest.approx(curve, rel=1e-5)


def test_accumulated_gradients_have_the_size_of_whole_ones(files, tmp_path):
    """Adam forgets a gradient's size; an epsilon far above the gradients makes a factor too many show."""
    flags = ["--adam_eps", "100", "--lr_init", "30", "--lr_schedule", "constant", "--grad_clip", "0"]
    train(files, tmp_path / "whole", *flags)
    train(
        files,
        tmp_path / "parts",
        *flags,
        *"--strategy deepspeed_stage_1 --micro_bsz 2 --accumulate_grad_batches 4".split(),
    )
    curve = losses(tmp_path / "whole")
    assert abs(curve[-1] - curve[0]) > 1e-2 * curve[0], "the steps must be large enough to show their size"
    assert losses(tmp_path / "parts") == pytest.approx(curve, rel=1e-5)


def test_a_run_is_not_overwritten_or_resumed_with_other_settings(files, plain):
    for flags, word in (
        (["--epoch_count", "2"], "--resume auto"),
        (["--data_file", "absent.jsonl"], "absent.jsonl can't be read"),
        (
            ["--epoch_count", "2", "--lr_init", "1", "--beta1", "0.8", "--resume", "auto"],
            "has lr_init 0.01, now it is 1.0; beta1 0.9, now it is 0.8. Resume with --config",
        ),
    ):
        code, output = program.run(command(files, plain[0], *flags)[2:])
        assert code == 2 and word in output and "Traceback" not in output, output


def test_a_run_whose_settings_are_gone_or_spoilt_is_not_gone_on_with(tmp_path):
    config = Config(proj_dir=str(tmp_path), resume="auto")
    assert earlier_settings(config.proj_dir, config.resume) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000001.pth").touch()
    with pytest.raises(
        rwkv_miss.UserError, match="config.yaml, with the settings of the run, is not there; put it back"
    ):
        earlier_settings(config.proj_dir, config.resume)
    (tmp_path / "config.yaml").write_text("devices: two\n")
    with pytest.raises(rwkv_miss.UserError, match="config.yaml: --devices two: expected a whole number"):
        earlier_settings(config.proj_dir, config.resume)


def test_a_checkpoint_says_what_it_is_and_is_no_model(files, plain, tmp_path, capsys):
    path, base = plain[0] / "checkpoints" / "step-00000006.pth", files / "v7.pth"
    count = sum(t.numel() for t in rwkv_miss.read_checkpoint(plain[0] / "adapter.pth").values())
    rwkv_miss_main(["inspect", str(path)])
    shown = capsys.readouterr().out
    assert "checkpoint of a run" in shown and f"trained      12, {count:,} parameters" in shown
    assert "step         6" in shown
    assert f"for merge and chat there is {plain[0]}/adapter.pth" in shown
    alone, merged = shutil.copy(path, tmp_path), tmp_path / "merged.pth"
    for file, output in ((path, f"{plain[0]}/adapter.pth"), (alone, "the adapter.pth of its run")):
        for use in (
            read_model_file,
            lambda file: rwkv_miss.load_adapter(RWKV.load(base), file),
            lambda file: rwkv_miss.merge_file(base, file, merged),
            lambda file: rwkv_miss.merge_file(file, plain[0] / "adapter.pth", merged),
        ):
            with pytest.raises(
                rwkv_miss.UserError,
                match=f"--resume auto goes on, .* of step 6; what was trained is in {output}$",
            ):
                use(file)


def report_dtypes(rank):
    """Have every step print the dtypes that it finds."""
    step = trainer.FineTuning.training_step

    def probe(self, batch, index):
        layer = self.model.blocks[0].att.key
        print("dtypes", layer.weight.dtype, layer.miss.dtype, self.model.emb.weight.dtype)
        return step(self, batch, index)

    trainer.FineTuning.training_step = probe


@pytest.mark.parametrize("strategy", ["auto", slow("deepspeed_stage_3")])
def test_a_bf16_base_keeps_its_dtype_and_the_adapter_is_fp32(files, tmp_path, strategy):
    flags = command(files, tmp_path / "run", "--precision", "bf16", "--strategy", strategy)[2:]
    output = succeed(program.run(flags, report_dtypes))
    assert (
        output.count("dtypes torch.bfloat16 torch.float32 torch.bfloat16") == output.count("dtypes") == 3
    ), output
    adapter = torch.load(tmp_path / "run/adapter.pth", weights_only=True)
    assert len(adapter) == 12 and all(t.dtype == torch.float32 for t in adapter.values())


def test_fp16_with_loss_scaling_follows_fp32(files, tmp_path, plain):
    train(files, tmp_path / "run", "--epoch_count", "2", "--precision", "fp16")
    for one, half in zip(losses(plain[0]), losses(tmp_path / "run"), strict=True):
        # fp16 activations have 11 bits; the losses of these random models move by about 1e-3
        assert abs(one - half) < 2e-2 * one


@pytest.mark.parametrize("version", [slow(6), 7])
def test_full_training_from_scratch_learns_and_loads_elsewhere(files, tmp_path, version):
    sizes = "--n_layer 2 --n_embd 32 --head_size 16 --epoch_count 4"
    flags = f"--peft none --version x0{version}0 {sizes} --grad_cp 1".split()
    train(files, tmp_path / "run", *flags)
    curve = losses(tmp_path / "run")
    assert curve[0] > 5 and curve[-1] < 0.7 * curve[0]
    path = tmp_path / "run/model.pth"
    model = RWKV.load(path, torch.float32)
    assert model.arch.version == version and read_metadata(path)["tokenizer"] == "bytes"
    if version == 7:
        assert "blocks.0.att.v1" in model.state_dict(), "parameters without a gradient stay in the file"
    exact = tmp_path / "fp32.pth"
    torch.save({k: v.float() for k, v in torch.load(path, weights_only=True).items()}, exact)
    ids = list(b"User: q")
    close("logits", model(torch.tensor([ids]))[0][0], pypi_rwkv(exact)(ids)[0], 2e-5)


@pytest.mark.slow
def test_full_training_gathers_every_tensor_that_zero_3_shares_out(files, tmp_path):
    """Layer 0's v1 has 10,240 elements here, above the size that stage 3 leaves whole, and is not trained: it
    must be gathered all the same.
    """
    train(
        files,
        tmp_path / "run",
        *"""
            --peft none --version x070 --n_layer 2 --n_embd 320 --strategy deepspeed_stage_3 --devices 2
            --micro_bsz 4
        """.split(),
    )
    model = RWKV.load(tmp_path / "run/model.pth")
    assert model.blocks[0].att.v1.shape == (320, 32)


def test_full_training_of_a_base_keeps_its_keys_shapes_order_and_dtypes(files, tmp_path):
    base = torch.load(files / "v7.pth", weights_only=True)
    odd = {name: t.squeeze().bfloat16() for name, t in reversed(base.items())}
    torch.save(odd, tmp_path / "odd.pth")
    train(files, tmp_path / "run", "--peft", "none", "--load_model", str(tmp_path / "odd.pth"))
    trained = torch.load(tmp_path / "run/model.pth", weights_only=True)
    assert [(n, t.shape, t.dtype) for n, t in trained.items()] == [
        (n, t.shape, t.dtype) for n, t in odd.items()
    ]
    assert not torch.equal(trained["head.weight"], odd["head.weight"])


@pytest.mark.rare
def test_torchrun_launches_the_same_command(files, tmp_path, plain):
    proj_dir = tmp_path / "run"
    flags = command(files, proj_dir, *"--epoch_count 2 --strategy ddp --devices 2 --micro_bsz 4".split())[1:]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launcher, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(proj_dir) == pytest.approx(losses(plain[0]), rel=1e-5)


def test_signals_are_answered_at_once(capfd, monkeypatch):
    """The first one asks the run to stop. What follows within a second belongs to it; later only Ctrl-C ends
    the run. Before the first step any signal does.
    """

    class Ended(Exception):
        pass

    def end(code):
        raise Ended(code)

    now = 100.0
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now)
    report = StepReport("", 1, 0.0, None, [])
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        with report.answering_signals():
            with pytest.raises(Ended, match=str(128 + signal.SIGTERM)):
                signal.raise_signal(signal.SIGTERM)
            said = "\ninterrupted before the first step; the same command starts again\n"
            assert capfd.readouterr().err == said and not report.stop
            report.training = True
            signal.raise_signal(signal.SIGINT)
            words = "stopping after this step and saving; press Ctrl-C again to quit now without saving"
            assert report.stop and words in capfd.readouterr().err
            try:
                for number in numbers:  # as a launcher passes the same Ctrl-C on
                    signal.raise_signal(number)
                now += 1.1
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGHUP)
            except KeyboardInterrupt:
                pytest.fail("it was taken for a second Ctrl-C")
            assert not capfd.readouterr().err
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            assert "ended within a step; what was saved before is unchanged" in capfd.readouterr().err
        # while the last files are written
        after = [signal.getsignal(number) for number in numbers]
        assert after == [before[signal.SIGINT], report._ask_to_stop, report._ask_to_stop]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_first_step_says_nothing_of_the_time_that_is_left(capsys):
    """The first step takes 30 s here and the others 1 s each, as where it prepares what they find."""
    report = StepReport("", 100, 0.0, None, [])
    report.metrics = SUPERVISED
    report.bar = Progress("training", 100, "steps", shown=False)
    report.begun, report.last_line, report.steps_here = 0.0, 0.0, 0
    for step, now in ((1, 30.0), (2, 31.0), (3, 32.0), (4, 33.0), (5, 34.0)):
        line = dict(step=step, loss=2.0, tokens=10, trained_tokens=1, lr=1e-3, tokens_per_second=10.0)
        report._show(line, 2.0, now)
    first, later = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1/100 ") and "left" not in first
    assert later.startswith("step 5/100 ") and later.endswith(", 95 s left")
    assert report.bar.done == 5 and report.bar.first == 1
