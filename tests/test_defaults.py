"""Defaults of settings that were not given: chosen from the data, the method and the free memory; printed,
saved, and equal when they are chosen again.
"""

import dataclasses
import random
import shlex

import pytest

from rwkv_miss import METHODS
from rwkv_miss.errors import UserError
from src.common.formatting import size_text
from src.config import AUTO, FIELDS, Config, parse, recorded_settings, validate
from src.config.parse import Recorded
from src.config.schema import CHOSEN
from src.losses import options_of
from src.losses.base import Facts, Loss
from src.planning.defaults import (
    choose_batch,
    choose_length,
    choose_no_evaluations,
    chosen_rate,
    held_out_share,
    own_rank,
    row_length,
)
from src.planning.draft import Draft
from src.training import resume
from src.training.optimizer import learning_rate_factor
from src.training.resume import inherit, keep_rows_per_step

from . import program
from .conftest import make_arch, save_base, write_rows
from .program import losses, succeed

AUTOMATIC = {name for name, field in FIELDS.items() if field.metadata["automatic"]}


@pytest.mark.parametrize(
    "longest, length",
    [(1, 256), (256, 256), (257, 512), (1637, 2048), (4096, 4096), (4097, 4096), (10**6, 4096)],
)
def test_rows_are_as_long_as_the_longest_document(longest, length):
    found, reason = row_length(longest, 0)
    assert found == length and reason.startswith("the longest document has ")
    assert ("more than is chosen" in reason) == (longest > 4096)
    without_a_bound = {4097: 8192, 10**6: 1 << 20}
    assert row_length(longest, 128)[0] == without_a_bound.get(longest, length), "chunks have no bound"


def test_a_text_makes_rows_enough_for_the_steps_of_a_run():
    assert row_length(15_000, 0, 15_000) == (
        256,
        "longer rows of 15,000 tokens of running text would be fewer than 50",
    )
    assert row_length(10**6, 0, 10**6)[0] == 4096 and row_length(10**6, 0, 4096 * 50 - 1)[0] == 2048
    assert row_length(15_000, 64, 15_000)[0] == 16384


@pytest.mark.parametrize(
    "method, width, rank",
    [("miss", 4096, 64), ("miss", 512, 64), ("miss", 96, 12), ("lora", 32, 4), ("miss", 7, 1)],
)
def test_a_narrow_model_gets_a_small_rank(method, width, rank):
    assert own_rank(method, width) == (
        {"rank": rank},
        f"1/8 of the width, {width}" if width < 512 else f"the rank of --peft {method}",
    )
    assert own_rank("state", width)[0] == {}


@pytest.mark.parametrize(
    "documents, settings, held",
    [
        (19, {}, 0),
        (20, {}, 5),
        (27, {}, 5),
        (60, {}, 6),
        (99, {}, 10),
        (100, {}, 10),
        (150, {}, 10),
        (240, {}, 12),
        (1319, {}, 66),
        (7473, {}, 97),
        (10**6, {}, 100),
        (40, {"eval_steps": 5}, 5),
        (8, {"eval_steps": 5}, 2),
        (7473, {"eval_file": "a"}, 0),
    ],
)
def test_about_a_hundred_documents_are_held_out_where_there_are_enough(documents, settings, held):
    share, reason = held_out_share(documents, "document", **{"eval_file": "", "eval_steps": 0} | settings)
    assert round(share * documents) == held and f"{share:.2g}" == f"{share:g}"
    none = "--eval_file is given" if settings else "19 documents, too few to leave some out"
    assert reason == (f"{held} documents of {documents:,}" if held else none)


@pytest.mark.parametrize(
    "rows, settings, room, batch",
    [
        # (micro_bsz, accumulate_grad_batches, grad_cp)
        (4800, {}, 800, (8, 1, 0)),
        (4800, {}, 799, (4, 2, 0)),
        (4800, {}, 100, (1, 8, 0)),
        (4800, {}, 99, (1, 8, 2)),
        (4800, {}, 59, (1, 8, 1)),
        (4800, {}, 40, (1, 8, 1)),
        (4800, {}, 1, (1, 8, 1)),
        (4800, {"grad_cp": 0}, 99, (1, 8, 0)),
        (4800, {"grad_cp": 1}, 800, (8, 1, 1)),
        (4799, {}, 800, (4, 1, 0)),
        (2400, {"epoch_count": 2}, 800, (8, 1, 0)),
        (3, {}, 800, (2, 1, 0)),
        (1, {}, 800, (1, 1, 0)),
        (3, {"epoch_steps": 9}, 800, (8, 1, 0)),
        (45, {"loss": "grpo"}, 1600, (16, 1, 0)),
        (45, {"loss": "grpo"}, 800, (8, 2, 0)),
        (9, {"loss": "grpo"}, 1600, (8, 1, 0)),
        (4800, {"devices": 2}, 800, (4, 1, 0)),
        (4800, {"devices": 3, "num_nodes": 4}, 800, (1, 1, 0)),
        (4799, {"devices": 2}, 200, (2, 1, 0)),
        (3, {"global_bsz": 12}, 800, (6, 2, 0)),
        (3, {"global_bsz": 12, "devices": 2}, 300, (3, 2, 0)),
        (3, {"global_bsz": 7}, 699, (1, 7, 0)),
        (3, {"accumulate_grad_batches": 3}, 800, (8, 3, 0)),
        (3, {"accumulate_grad_batches": 3, "global_bsz": 60}, 800, (20, 3, 1)),
    ],
)
def test_the_batch_is_the_largest_that_fits(rows, settings, room, batch):
    """A row needs 100, 60 when the time mixes are recomputed, 40 when all is."""
    draft = Draft(Config(**settings))

    def needed(tried):
        assert not tried.is_automatic("micro_bsz") and not tried.is_automatic("grad_cp")
        assert tried.accumulate_grad_batches == settings.get(
            "accumulate_grad_batches", tried.accumulate_grad_batches
        )
        return tried.micro_bsz * {0: 100, 2: 60, 1: 40}[tried.grad_cp]

    choose_batch(draft, rows, needed, room)
    config = draft.config
    assert (config.micro_bsz, config.accumulation, config.grad_cp) == batch
    assert config.is_automatic("accumulate_grad_batches") != (
        "accumulate_grad_batches" in settings or "global_bsz" not in settings
    )
    assert draft.config.origins["micro_bsz"].startswith(
        f"{CHOSEN}: needs {size_text(needed(config))}, and {size_text(room)} may be used"
    )


@pytest.mark.parametrize(
    "rows, settings, few",
    [
        (4799, {}, True),
        (4800, {}, False),
        (4800, {"devices": 3}, False),
        (4799, {"devices": 16}, True),
        (3, {"epoch_steps": 9}, False),
        (3, {"global_bsz": 4}, False),
        (3, {"accumulate_grad_batches": 2}, False),
    ],
)
def test_few_rows_in_a_step_are_explained_by_the_data_only_where_they_follow_from_it(rows, settings, few):
    draft = Draft(Config(**settings))
    choose_batch(draft, rows, lambda tried: 0, 1)
    assert ("fewer than 600 steps" in draft.config.origins["micro_bsz"]) == few


def length_of(config):
    return (config.epoch_count, config.eval_steps, config.early_stop, config.warmup_steps)


@pytest.mark.parametrize(
    "steps, held_out, settings, length",
    [
        # (epoch_count, eval_steps, early_stop, warmup_steps)
        (2001, True, {}, (1, AUTO, AUTO, 100)),
        (600, True, {}, (1, AUTO, AUTO, 30)),
        (399, True, {}, (2, 100, AUTO, 39)),
        (99, True, {}, (6, 100, AUTO, 29)),
        (14, True, {}, (43, 100, AUTO, 30)),
        (1, True, {}, (600, 100, AUTO, 30)),
        (60, False, {}, (1, AUTO, AUTO, 3)),
        (99, True, {"inner_steps": 7}, (6, 105, AUTO, 29)),
        (60, True, {"epoch_steps": 30}, (1, AUTO, AUTO, 1)),
        # a given setting stays, and brings no other one
        (60, True, {"epoch_count": 1}, (1, AUTO, AUTO, 3)),
        (60, True, {"epoch_count": 7}, (7, AUTO, AUTO, 21)),
        (60, True, {"epoch_count": 2, "epoch_steps": 30}, (2, AUTO, AUTO, 3)),
        (60, True, {"warmup_steps": 0}, (10, 100, AUTO, 0)),
        (60, True, {"eval_steps": 20, "early_stop": 5}, (10, 20, 5, 30)),
        # nothing would tell what more passes do
        (60, True, {"eval_steps": 0}, (1, 0, AUTO, 3)),
        (60, True, {"loss": "grpo", "rewards": {"exact": 1.0}}, (3, AUTO, AUTO, 9)),
    ],
)
def test_few_data_are_read_for_about_600_steps(steps, held_out, settings, length):
    draft = Draft(Config(**settings))
    choose_length(draft, steps, 480, held_out)
    assert length_of(draft.config) == length
    assert not draft.config.origins.keys() & settings.keys()
    assert draft.config.lr_schedule == "cos"


@pytest.mark.parametrize(
    "steps, settings, reason",
    [
        (60, {}, "one pass makes 60 steps, and few data are read for about 600"),
        (600, {}, "one pass makes 600 steps"),
        (60, {"epoch_steps": 30}, "--epoch_steps is given"),
    ],
)
def test_the_number_of_passes_has_its_reason(steps, settings, reason):
    draft = Draft(Config(**settings))
    choose_length(draft, steps, 480, True)
    assert draft.config.origins["epoch_count"] == f"chosen: {reason}"


def test_few_documents_of_which_none_is_held_out_are_repeated():
    lengths = []
    for documents, loss in ((19, "sft"), (20, "sft"), (19, "grpo")):
        draft = Draft(Config(loss=loss, rewards={"exact": 1.0}))
        choose_length(draft, 3, documents, False)
        lengths.append(length_of(draft.config))
    assert lengths == [(200, AUTO, AUTO, 30), (1, AUTO, AUTO, 0), (1, AUTO, AUTO, 0)]


@pytest.mark.parametrize(
    "method, published", [("miss", 2e-5), ("lora", 2e-4), ("pissa", 2e-5), ("dora", 2e-4), ("none", 1e-5)]
)
def test_the_chosen_rate_is_near_the_published_one_for_large_models(method, published):
    """7B: 32 layers of 4096. The published rates are of batches of 64 rows, a run here has 2 to 8 in a step:
    rates may be as high at most."""
    config = parse(["--load_model", "x", "--data_file", "x", "--peft", method])
    if method != "none":
        config = dataclasses.replace(config, peft_config={"rank": 64})
    large = chosen_rate(config, make_arch(7, n_layer=32, n_embd=4096, head_size=64))
    assert published / 3 < large <= published
    assert chosen_rate(config, make_arch(7, n_layer=12, n_embd=768, head_size=64)) > 2 * large


@pytest.mark.parametrize("method", [*METHODS, "none"])
def test_every_method_has_a_rate(method):
    config = parse(["--load_model", "x", "--data_file", "x", "--peft", method])
    assert 1e-4 < chosen_rate(config, make_arch(7)) <= 1


def test_a_new_model_gets_the_published_rate():
    config = Config(peft="none", n_layer=2, n_embd=64, version="x070")
    assert chosen_rate(config, make_arch(7)) == config.published_rate == 6e-4


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


def test_a_preference_alone_begins_lower():
    arch, alone = (
        make_arch(7),
        Config(load_model="base.pth", loss="dpo", sft_weight=0.0, peft_config={"r": 4}),
    )
    supervised = chosen_rate(dataclasses.replace(alone, loss="sft"), arch)
    assert chosen_rate(dataclasses.replace(alone, sft_weight=1.0), arch) == supervised
    assert chosen_rate(alone, arch) == pytest.approx(supervised / 20, rel=0.05)


def test_the_warm_up_is_linear():
    config = Config(warmup_steps=3, lr_schedule="cos")
    rising = [learning_rate_factor(config, 1.0, 60)(step) for step in range(4)]
    assert rising[:3] == pytest.approx([1 / 3, 2 / 3, 1]) and rising[3] <= 1


@pytest.mark.parametrize(
    "shape, factors",
    [
        ("cos", [1, 0.505, 0.01]),
        ("linear", [1, 0.505, 0.01]),
        ("exp", [1, 0.1, 0.01]),
        ("wsd", [1, 1, 0.01]),
        ("constant", [1, 1, 1]),
    ],
)
def test_a_schedule_at_its_beginning_halfway_and_at_its_end(shape, factors):
    config = Config(lr_final=0.02, warmup_steps=0, lr_schedule=shape)
    factor = learning_rate_factor(config, 2, 101)
    assert [factor(step) for step in (0, 50, 100)] == pytest.approx(factors)
    quarter = {"cos": 0.855, "linear": 0.7525, "exp": 0.01**0.25}
    assert factor(25) == pytest.approx(quarter.get(shape, 1), abs=1e-3)


def test_a_plateau_halves_the_rate_after_each_evaluation_that_is_no_better():
    history = [
        {"step": step, "loss": loss} for step, loss in ((0, 9.0), (2, 4.0), (4, 4.0), (6, None), (8, 3.0))
    ]
    factor = learning_rate_factor(
        Config(lr_final=0.3, warmup_steps=2, lr_schedule="plateau"), 1.0, 99, history
    )
    assert [factor(step) for step in range(10)] == [0.5, 1, 1, 1, 1, 0.5, 0.5, 0.3, 0.3, 0.3]


def test_a_batch_that_was_given_is_kept_and_nothing_is_estimated():
    draft = Draft(Config(micro_bsz=3))
    choose_batch(draft, 999, None, 0)
    config = draft.config
    assert (config.micro_bsz, config.accumulate_grad_batches, config.grad_cp) == (3, 1, 0)
    assert "micro_bsz" not in draft.config.origins


# a resumed run

FILES = {"load_model": "base.pth", "data_file": "rows.jsonl"}
BEFORE = Config(
    **FILES,
    micro_bsz=4,
    accumulate_grad_batches=2,
    grad_cp=1,
    ctx_len=512,
    eval_split=0.05,
    lr_init=1e-4,
    precision="fp32",
    wkv="cpu",
    accelerator="cpu",
)


def resumed(**settings):
    draft = Draft(Config(**FILES, **settings))
    inherit(draft, Recorded(BEFORE, {}))
    keep_rows_per_step(draft, BEFORE.rows_per_step, BEFORE.accumulation)
    return draft


def test_a_resumed_run_keeps_what_was_chosen_for_it():
    config = resumed().config
    changed = {name for name in FIELDS if getattr(config, name) != getattr(BEFORE, name)}
    assert changed == {"wkv", "accelerator"}, "what depends on the machine alone is chosen again"
    assert {*resume.BATCH, *resume.LENGTH} <= resume.MAY_CHANGE


@pytest.mark.parametrize(
    "settings, length",
    [
        # (epoch_count, eval_steps, early_stop, warmup_steps)
        ({}, (4, 60, 1, 12)),
        ({"epoch_count": 6}, (6, 60, 1, 12)),
        ({"early_stop": 3}, (4, 60, 3, 12)),
        ({"epoch_steps": 30}, (1, AUTO, AUTO, 12)),
        ({"early_stop": 0}, (4, 60, 0, 12)),
    ],
)
def test_a_resumed_run_keeps_its_length_and_its_warm_up(settings, length):
    before = dataclasses.replace(BEFORE, epoch_count=4, eval_steps=60, early_stop=1, warmup_steps=12)
    draft = Draft(Config(**FILES, **settings))
    inherit(draft, Recorded(before, {}))
    choose_length(draft, 60, 480, True)
    assert length_of(draft.config) == length


def test_a_plateau_keeps_its_evaluations_in_a_run_of_another_length():
    before = dataclasses.replace(BEFORE, epoch_count=4, eval_steps=60, early_stop=3, lr_schedule="plateau")
    draft = Draft(Config(**FILES, epoch_steps=300))
    inherit(draft, Recorded(before, {}))
    choose_length(draft, 60, 480, True)
    choose_no_evaluations(draft)
    assert length_of(draft.config) == (1, 60, 0, 15) and draft.config.lr_schedule == "plateau"


def test_a_run_of_an_older_release_keeps_its_one_pass_without_warm_up():
    before = dataclasses.replace(BEFORE, epoch_count=1, eval_steps=0, early_stop=0, warmup_steps=0)
    draft = Draft(Config(**FILES))
    inherit(draft, Recorded(before, {}))
    choose_length(draft, 60, 480, True)
    assert length_of(draft.config) == (1, 0, 0, 0)


@pytest.mark.parametrize(
    "settings, batch",
    [
        ({"devices": 2}, (4, 1)),
        ({"devices": 4}, (2, 1)),
        ({"micro_bsz": 2}, (2, 4)),
        ({"micro_bsz": 2, "devices": 2}, (2, 2)),
        ({"grad_cp": 0}, (4, 2)),
        ({"accumulate_grad_batches": 4}, (2, 4)),
        ({"accumulate_grad_batches": 1}, (8, 1)),
        ({"devices": 2, "accumulate_grad_batches": 4}, (1, 4)),
        ({"accumulate_grad_batches": 4, "global_bsz": 8}, (2, 4)),
        # as many passes as before, in the same command or the run's own file, on other devices
        ({"accumulate_grad_batches": 2}, (4, 2)),
        ({"devices": 2, "micro_bsz": 4, "accumulate_grad_batches": 2}, (4, 1)),
        ({"devices": 2, "accumulate_grad_batches": 2}, (4, 1)),
    ],
)
def test_a_step_keeps_its_rows(settings, batch):
    draft = resumed(**settings)
    choose_batch(draft, 10, lambda tried: 0, 1)
    config = draft.config
    assert (config.micro_bsz, config.accumulation) == batch
    assert config.rows_per_step == 8
    validate(config)


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            {"devices": 3},
            "has 8 rows, which is not a multiple of devices x num_nodes = 3; choose --devices that fits",
        ),
        (
            {"micro_bsz": 3},
            "not a multiple of micro_bsz x devices x num_nodes = 3; choose a --micro_bsz that fits",
        ),
        (
            {"accumulate_grad_batches": 3},
            "accumulate_grad_batches x devices x num_nodes = 3; choose a --accumulate_grad_batches that fits",
        ),
        (
            {"micro_bsz": 2, "accumulate_grad_batches": 1},
            "has 8 rows, now it has 2; drop --global_bsz and --accumulate_grad_batches",
        ),
        ({"global_bsz": 16}, "has 8 rows, now it has 16; drop --global_bsz"),
    ],
)
def test_a_step_that_can_not_keep_its_rows_is_an_error_with_both_numbers(settings, words):
    with pytest.raises(UserError, match=words):
        resumed(**settings)


# the program


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random base over bytes, and 120 documents of at most 60 bytes."""
    folder = tmp_path_factory.mktemp("choices")
    save_base(folder / "base.pth")
    rng = random.Random(0)
    rows = [{"text": "".join(rng.choices("abcd ", k=rng.randint(40, 60)))} for _ in range(120)]
    write_rows(folder / "rows.jsonl", rows)
    return folder


def few_steps(rank):
    """A run with the defaults is long. 24 rows of 256 tokens, two in a step, are read five times."""
    Loss.facts = Facts(usual_steps=60)


def test_a_run_without_settings_says_what_it_chose_and_the_command_does_it_again(files, tmp_path):
    flags = f"""
        --load_model {files}/base.pth --data_file {files}/rows.jsonl --tokenizer bytes --peft_config r=5
    """.split()
    words = [*flags, "--proj_dir", str(tmp_path / "first"), "--verbose"]
    output = succeed(program.run(words, few_steps, counted=True))
    assert " ctx_len 256: the longest document has 60 tokens" in output
    assert "eval_split 0.083: 10 documents of 120" in output
    assert ": from method, rank and widths" in output
    assert "micro_bsz 2, accumulate_grad_batches 1, grad_cp 0: needs " in output
    saved = recorded_settings(str(tmp_path / "first/config.yaml")).settings
    # options of other losses are read with those losses alone
    filled = AUTOMATIC - options_of().keys() - {"lr_map"}  # empty where no part of the base was chosen
    assert not [name for name in filled if saved.is_automatic(name)], "the saved settings are filled in"

    merge = next(line for line in output.splitlines() if line.startswith("merge it:"))
    assert merge.endswith(f"--out {tmp_path / 'first/merged.pth'}"), (
        "a second run's file would replace it elsewhere"
    )
    line = (
        next(line for line in output.splitlines() if line.startswith("in full"))
        .removeprefix("in full")
        .strip()
    )
    words = shlex.split(line)
    assert words[:2] == ["python", "train.py"]
    assert parse(words[2:]).settled() == saved
    assert line in (tmp_path / "first/run_card.md").read_text()
    succeed(program.run([*words[2:], "--proj_dir", str(tmp_path / "second")]))
    succeed(
        program.run(["--config", str(tmp_path / "first/config.yaml"), "--proj_dir", str(tmp_path / "third")])
    )
    curve = losses(tmp_path / "first")
    assert len(curve) >= 20 and curve == losses(tmp_path / "second") == losses(tmp_path / "third")
    second = recorded_settings(str(tmp_path / "second/config.yaml")).settings
    assert second == dataclasses.replace(saved, proj_dir=str(tmp_path / "second"))


def test_several_processes_choose_alike(files, tmp_path):
    """Each by itself, before they can talk."""
    flags = f"""
        --load_model {files}/base.pth --data_file {files}/rows.jsonl --tokenizer bytes --peft_config r=5
        --epoch_steps 2 --devices 2 --strategy ddp --proj_dir {tmp_path}/run
    """.split()
    output = succeed(program.run(flags, counted=True))
    assert "2 steps of 8 rows (micro_bsz 4 x accumulate 1 x devices 2)" in output
    assert "of memory for 2 processes, of " in output
    assert len(losses(tmp_path / "run")) == 2
