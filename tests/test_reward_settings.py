"""Settings of --loss grpo: which belong together, what is chosen, and whose code is run."""

import dataclasses

import pytest

from rwkv_miss.errors import UserError
from src.config import AUTO, parse, recorded_settings, save
from src.planning.defaults import choose_loss
from src.planning.draft import Draft
from src.run import prepare
from src.sources import source_of
from src.training.resume import inherit

REQUIRED = ["--load_model", "base.pth", "--data_file", "rows.jsonl", "--loss", "grpo"]


def settings(*flags):
    return parse([*REQUIRED, *flags])


def mistake(*flags):
    with pytest.raises(UserError) as caught:
        settings(*flags)
    return str(caught.value)


def test_what_belongs_together_is_taken():
    settings("--beta", "0.04", "--train_parts", "ln", "--reference", "base.pth")
    settings("--rewards", "regex=1,length=0.5,exact=0", "--reward_regex", "^x+$", "--reward_length", "8")
    config = settings("--rewards", "own=1,exact=0.25", "--reward_file", "own.py")
    assert config.rewards == {"own": 1, "exact": 0.25} and config.origins["reward_file"] == "command line"
    config = settings("--inner_steps", "3", "--save_steps", "12", "--rollback_steps", "20", "--beta", "0")
    assert (config.inner_steps, config.beta) == (3, AUTO)
    assert (
        source_of(config).loss.words.example == "question" and config.on_rewards and not config.on_preferences
    )


@pytest.mark.parametrize(
    "flags, high, scale",
    [
        ("", 0.28, "group"),
        ("--clip_low 0.1", 0.28, "group"),
        ("--clip_low 0.3", 0.3, "group"),
        ("--grpo_type grpo", 0.2, "group"),
        ("--grpo_type dr_grpo --clip_low 0.125", 0.125, "none"),
        ("--grpo_type dr_grpo --advantage_scale group --clip_high 0.5", 0.5, "group"),
        ("--advantage_scale none --clip_high 0.1", 0.1, "none"),
    ],
)
def test_what_is_chosen_is_saved_and_read_again(flags, high, scale, tmp_path):
    draft = Draft(settings(*flags.split()))
    choose_loss(draft)
    config = draft.config
    assert (config.clip_high, config.advantage_scale, config.beta) == (high, scale, 0)
    assert config.rewards == {"exact": 1} and config.origins["rewards"].startswith("chosen: ")
    save(config, str(tmp_path / "config.yaml"))
    again = Draft(parse(["--config", str(tmp_path / "config.yaml")]))
    choose_loss(again)
    assert again.config == config


def test_code_is_named_on_the_command_line_only(tmp_path):
    """No settings file runs code, not even that of the resumed run."""
    config = settings("--rewards", "own=1", "--reward_file", "own.py")
    path = str(tmp_path / "config.yaml")
    save(config, path)
    with pytest.raises(UserError, match="config.yaml has reward_file own.py, whose code would be run"):
        parse(["--config", path])
    assert parse(["--config", path, "--reward_file", "own.py"]) == config
    before = recorded_settings(path)
    assert before.settings == config.settled(), "it may be compared with"
    for flags in ((), ("--rewards", "own=1", "--resume", "auto")):
        resumed = Draft(settings(*flags))
        with pytest.raises(UserError, match="only the command line may name code; add --reward_file own.py"):
            inherit(resumed, before)
    new = settings(*flags, "--proj_dir", str(tmp_path / "no run yet"))
    with pytest.raises(UserError, match="--rewards own: expected one of .* FILE.py with a function own"):
        prepare(new)
    resumed = Draft(settings("--rewards", "own=1", "--reward_file", "moved.py"))
    inherit(resumed, before)
    assert (resumed.config.rewards, resumed.config.reward_file) == ({"own": 1}, "moved.py")


@pytest.mark.parametrize(
    "flags, today",
    [
        ("--loss_type bnpo --temperature 1.0 --top_k 0", {"grpo_type": "dapo"}),
        ("--loss_type dapo --epsilon 0.1 --epsilon_high 0.4", {"clip_low": 0.1, "clip_high": 0.4}),
        ("--loss_type dr_grpo --scale_rewards False", {"grpo_type": "dr_grpo", "advantage_scale": "none"}),
        ("--loss_type=grpo --scale_rewards group", {"grpo_type": "grpo", "advantage_scale": "group"}),
        (
            "--loss grpo --num_generations 4 --max_completion_length 99 --num_iterations 2",
            {"group_size": 4, "max_tokens": 99, "inner_steps": 2},
        ),
    ],
)
def test_what_trl_calls_it(flags, today):
    found = parse(["--load_model", "base.pth", "--data_file", "rows.jsonl", *flags.split()])
    assert found == dataclasses.replace(settings(), **today)


def test_a_reward_without_a_weight_has_the_weight_1():
    for flags, wanted in (
        ("--rewards exact", {"exact": 1}),
        ("--rewards exact,partial=0.5", {"exact": 1, "partial": 0.5}),
    ):
        assert settings(*flags.split()).rewards == wanted
