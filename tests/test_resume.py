"""Runs in folders: which one a folder holds, and whether it may be resumed with these settings."""

import dataclasses
import pathlib
import shutil

import pytest

from rwkv_miss.errors import UserError
from src import config as configuration
from src.common.first_process import RANK_VARIABLES
from src.config import AUTO, Config
from src.planning.draft import Draft
from src.training.resume import earlier_settings, find_checkpoint, inherit, settings_of_first_process

from .conftest import ROOT
from .program import losses, run, succeed

SETTINGS = {
    "load_model": "base.pth",
    "data_file": "rows.jsonl",
    "micro_bsz": 2,
    "ctx_len": 256,
    "eval_split": 0.0,
    "lr_init": 1e-4,
    "grad_cp": 0,
}


@pytest.fixture(autouse=True)
def first_process(monkeypatch):
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path):
    """folder(FILES...): a run's folder with these files, of which config.yaml has SETTINGS."""

    def make(*names):
        for name in names:
            path = pathlib.Path(tmp_path, name)
            path.parent.mkdir(exist_ok=True)
            path.touch()
        if "config.yaml" in names:
            configuration.save(Config(**SETTINGS), str(tmp_path / "config.yaml"))
        return str(tmp_path)

    return make


STEP_2, STEP_10 = "checkpoints/step-00000002.pth", "checkpoints/step-00000010.pth"


def resumed(proj_dir, **settings):
    """Return the checkpoint that a command with --resume auto finds."""
    config = Config(**SETTINGS | {"proj_dir": proj_dir, "resume": "auto"} | settings)
    draft, earlier = Draft(config), earlier_settings(config.proj_dir, config.resume)
    if earlier:
        inherit(draft, earlier)
    return find_checkpoint(draft.config, earlier and earlier.settings)


@pytest.mark.parametrize(
    "files",
    [[], ["config.yaml"], ["config.yaml", "adapter.pth"], ["config.yaml", "best.pth", "validation.jsonl"]],
)
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(folder, files):
    assert resumed(folder(*files)) is None


@pytest.mark.parametrize(
    "files, resume, words",
    [
        (
            ["adapter.pth"],
            "none",
            (
                r"holds a run already \(adapter.pth\); it has no checkpoint to resume from; choose another"
                r" --proj_dir"
            ),
        ),
        (
            ["adapter-step-40.pth"],
            "none",
            r"holds a run already \(adapter-step-40.pth\); it has no checkpoint",
        ),
        (["best.pth"], "none", r"holds a run already \(best.pth\); it has no checkpoint"),
        (["adapter.pth", "run.json"], "auto", r"holds a run already \(adapter.pth\); it has no checkpoint"),
        (
            ["adapter.pth", "config.yaml", STEP_2, STEP_10],
            "none",
            r"\(step-00000010.pth\); go on with --resume auto, or choose another",
        ),
    ],
)
def test_a_run_is_not_overwritten(folder, monkeypatch, files, resume, words):
    proj_dir = folder(*files)
    with pytest.raises(UserError, match=words):
        resumed(proj_dir, resume=resume)
    monkeypatch.setenv("RANK", "1")
    assert resumed(proj_dir, resume=resume) is None, (
        "only the first process writes, and sees what is there before"
    )


def test_a_run_resumes_from_its_newest_checkpoint(folder):
    proj_dir = folder("config.yaml", STEP_10, STEP_2)
    assert resumed(proj_dir).endswith(STEP_10)
    assert resumed(
        proj_dir, strategy="ddp", devices=2, chunk_ctx=64, wkv="torch", epoch_count=3, save_steps=7
    ).endswith(STEP_10)


@pytest.mark.parametrize(
    "changed, words",
    [
        (
            {"random_seed": 7},
            "has random_seed 42, now it is 7. Resume with --config .*config.yaml --resume auto, or choose",
        ),
        (
            {"lr_init": 1e-3, "data_file": "others.jsonl"},
            "data_file rows.jsonl, now it is others.jsonl; lr_init 0.0001, now it is 0.001",
        ),
        ({"eval_split": 0.1}, "eval_split 0.0, now it is 0.1"),
        ({"ctx_len": 512}, "ctx_len 256, now it is 512"),
        ({"reference": "other.pth"}, "has reference not given, now it is other.pth"),
        ({"layers": "last:1"}, "has layers not given, now it is last:1"),
        ({"init_adapter": "a.pth"}, "has init_adapter not given, now it is a.pth"),
        ({"think_weight": 0.5}, "think_weight 1.0, now it is 0.5"),
        ({"prompt_weight": 0.1}, "prompt_weight 0.0, now it is 0.1"),
        (
            {"eval_split": AUTO, "eval_steps": 5},
            "holds no documents out, so that --eval_steps 5 has none to evaluate; drop it",
        ),
    ],
)
def test_another_run_is_not_gone_on_with(folder, changed, words):
    with pytest.raises(UserError, match=words):
        resumed(folder("config.yaml", STEP_2), **changed)


@pytest.mark.parametrize("given, now", [("", "not given"), ("b.pth", "b.pth")])
def test_another_init_adapter_is_told_before_its_file_is_read(folder, given, now):
    """A setting that it brings, such as a rank, would be named as the difference."""
    proj_dir = folder("config.yaml", STEP_2)
    began = {"init_adapter": "a.pth", "peft": "lora", "layers": "1", "train_parts": "ln"}
    configuration.save(Config(**SETTINGS | began), f"{proj_dir}/config.yaml")
    draft = Draft(Config(**SETTINGS, init_adapter=given, proj_dir=proj_dir, resume="auto"))
    with pytest.raises(UserError, match=f"has init_adapter a.pth, now it is {now}. Resume with --config"):
        inherit(draft, earlier_settings(proj_dir, "auto"))


def test_what_an_older_run_left_to_the_device_may_be_chosen_now(folder):
    """An older config.yaml has auto, and not what that was."""
    proj_dir = folder("config.yaml", STEP_2)
    before = earlier_settings(proj_dir, "auto").settings
    assert before == Config(**SETTINGS).settled() and before.is_automatic("precision")
    assert find_checkpoint(dataclasses.replace(before, precision="fp32", proj_dir=proj_dir), before).endswith(
        STEP_2
    )


def test_checkpoints_without_the_settings_of_their_run(folder):
    with pytest.raises(
        UserError,
        match=(
            "config.yaml, with the settings of the run, is not there; put it back, or choose another"
            " --proj_dir"
        ),
    ):
        resumed(folder(STEP_2))


def test_another_method_is_told_apart_without_the_options_of_the_first(folder):
    proj_dir = folder("config.yaml", STEP_2)
    before = Config(**SETTINGS, peft="adalora", peft_config={"rank": 4, "delta_t": 2})
    configuration.save(before, f"{proj_dir}/config.yaml")
    now = Config(**SETTINGS, peft="dora", proj_dir=proj_dir, resume="auto")
    draft = Draft(now)
    inherit(draft, earlier_settings(now.proj_dir, now.resume))
    assert draft.config.peft_config is AUTO, (
        "which dora would refuse, before the user is told that the method is another"
    )
    with pytest.raises(UserError, match="has peft adalora, now it is dora"):
        find_checkpoint(draft.config, earlier_settings(now.proj_dir, now.resume).settings)


@pytest.mark.parametrize(
    "variables, reads", [({}, False), ({"LOCAL_RANK": "0"}, False), ({"LOCAL_RANK": "1"}, True)]
)
def test_what_lightning_starts_keeps_the_commits_of_the_first_process(folder, monkeypatch, variables, reads):
    proj_dir = folder("config.yaml")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = settings_of_first_process(proj_dir)
    assert (found and found.load_model) == (SETTINGS["load_model"] if reads else None)


def test_a_run_of_an_earlier_version_resumes_as_that_version_does(tmp_path):
    """tests/fixtures/run_6568956a: eight steps made there, with the checkpoint of the fourth. On the machine
    that made them the losses are equal to the bit; another CPU adds in another order.
    """
    folder, made = tmp_path / "out", ROOT / "tests/fixtures/run_6568956a"
    shutil.copytree(made, folder)
    steps = (made / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(steps[:4]))
    config, text = folder / "config.yaml", (made / "config.yaml").read_text()
    paths = {"demo/rwkv7-reverse.pth": ROOT / "demo/rwkv7-reverse.pth", "rows.jsonl": made / "rows.jsonl"}
    for name, path in {**paths, "proj_dir: out": f"proj_dir: {folder}"}.items():
        text = text.replace(name, str(path))
    config.write_text(text)
    succeed(run(["--config", str(config), "--resume", "auto"]))
    want, found = losses(made), losses(folder)
    assert len(found) == len(want) == 8 and found[:4] == want[:4]
    assert found[4:] == pytest.approx(want[4:], rel=1e-4)
