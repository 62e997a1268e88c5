"""Settings of the losses on preferences: which belong together, what is chosen, what a resumed run keeps."""

import dataclasses
import os

import pytest

from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import write_checkpoint
from src.config import AUTO, Config, parse, recorded_settings, save
from src.config.parse import Recorded
from src.config.schema import type_of
from src.losses import LOSSES as ALL_LOSSES
from src.losses import loss_of, options_of
from src.planning.base_model import check_reference
from src.planning.defaults import choose_loss
from src.planning.draft import Draft
from src.training.resume import MAY_CHANGE, inherit

from .conftest import make_arch, save_base

OF_LOSSES = {name: losses for name, (_, losses) in options_of().items()}
LOSSES = [name for name, loss in ALL_LOSSES.items() if loss.data in ("pairs", "labels")]
REQUIRED = ["--load_model", "base.pth", "--data_file", "rows.jsonl"]


# no default of any setting
def named(text):
    return dict(one.split("=", 1) for one in text.split())


GIVEN = named("""
    beta=0.25 sft_weight=0.5 loss_average=mean label_smoothing=0.125 simpo_gamma=1.5 orpo_lambda=0.25
    desirable_weight=2 undesirable_weight=3 reference=other.pth
""")


def mistake(*flags):
    with pytest.raises(UserError) as caught:
        parse([*REQUIRED, *flags])
    return str(caught.value)


@pytest.mark.parametrize(
    "loss, beta, sft_weight",
    [
        ("dpo", 0.1, 1),
        ("ipo", 0.1, 10),
        ("simpo", 2, 1),
        ("orpo", AUTO, 1),
        ("kto", 0.1, 1),
        ("sft", AUTO, AUTO),
    ],
)
def test_what_is_chosen_is_saved_and_read_again(loss, beta, sft_weight, tmp_path):
    draft = Draft(parse([*REQUIRED, "--loss", loss]))
    choose_loss(draft)
    config = draft.config
    assert (config.beta, config.sft_weight) == (beta, sft_weight)
    assert config.origins.get("sft_weight", "").startswith("chosen: ") == (loss != "sft")
    save(config, str(tmp_path / "config.yaml"))
    assert recorded_settings(str(tmp_path / "config.yaml")).settings == config.settled()
    again = Draft(parse(["--config", str(tmp_path / "config.yaml")]))
    choose_loss(again)
    assert again.config == config


def test_what_is_given_stays():
    draft = Draft(parse([*REQUIRED, "--loss", "dpo", "--beta", "0.5", "--sft_weight", "0"]))
    typed = draft.config
    choose_loss(draft)
    assert draft.config == typed and (typed.beta, typed.sft_weight) == (0.5, 0)
    draft = Draft(parse([*REQUIRED, "--loss", "ipo", "--beta", "0.3"]))
    choose_loss(draft)
    assert draft.config.sft_weight == 3.33, "as much as the preference pulls at first"


def test_a_resumed_run_keeps_its_loss():
    """No setting of a loss may change: it is what the steps so far have minimised, and the later ones would
    minimise another.
    """
    assert MAY_CHANGE & {"loss", *OF_LOSSES} == {"reward_file", "reward_timeout"}, "which are told of"
    before = parse([*REQUIRED, "--loss", "simpo", "--beta", "3", "--sft_weight", "0.5"])
    draft = Draft(parse([*REQUIRED, "--loss", "simpo"]))
    inherit(draft, Recorded(before, {}))
    choose_loss(draft)
    assert (draft.config.beta, draft.config.sft_weight) == (3, 0.5)
    assert "so far" in draft.config.origins["beta"]


def test_the_loss_has_all_its_settings():
    given = {name: type_of(name)(text) for name, text in GIVEN.items()}
    options = dataclasses.asdict(loss_of(Config(loss="dpo", **given)).options)
    assert options == {name: given[name] for name in options} and len(options) == 5
    assert {name for name in LOSSES if loss_of(Config(loss=name)).needs_reference} == {
        *OF_LOSSES["reference"]
    } - {"grpo", "distill", "distill_on_policy"}
    assert [name for name in LOSSES if not loss_of(Config(loss=name)).paired] == ["kto"]


def test_a_reference_is_a_whole_model_with_the_same_vocabulary(tmp_path):
    base = make_arch(7)
    path = str(tmp_path / "other.pth")
    config = Config(load_model="base.pth", reference=path)
    save_base(path, 6, vocab_size=base.vocab_size)
    check_reference(config.reference, config.load_model, base.vocab_size)  # another version and size
    save_base(path, vocab_size=base.vocab_size + 3)
    with pytest.raises(UserError, match=f"vocabulary of {base.vocab_size + 3} tokens, base.pth one of"):
        check_reference(config.reference, config.load_model, base.vocab_size)
    write_checkpoint(path, [], {"format": "rwkv-miss adapter", "base": "base.pth"})
    with pytest.raises(UserError, match="--reference .*is an adapter; merge it .*--base base.pth --adapter"):
        check_reference(config.reference, config.load_model, base.vocab_size)
    os.remove(path)
    with pytest.raises(UserError, match=f"--reference {path} does not exist"):
        check_reference(config.reference, config.load_model, base.vocab_size)


# the flags of other trainers


@pytest.mark.parametrize(
    "flags, today",
    [
        ("--dpo 1 --dpo_beta 0.02", {"loss": "dpo", "loss_average": "mean", "beta": 0.02, "sft_weight": 0.1}),
        ("--dpo --dpo_alpha 0", {"loss": "dpo", "loss_average": "mean", "beta": 0.01, "sft_weight": 0}),
        ("--orpo 1 --orpo_mode 0 --orpo_alpha 0.006", {"loss": "orpo", "orpo_lambda": 0.006}),
        ("--orpo 1", {"loss": "orpo", "orpo_lambda": 0.01}),
        ("--simpo 1 --simpo_alpha 0.3", {"loss": "simpo", "beta": 0.01, "simpo_gamma": 0}),
        ("--simpo 1 --simpo_gamma=0.5 --simpo_beta 2", {"loss": "simpo", "beta": 2, "simpo_gamma": 0.5}),
        ("--dpo 0 --orpo 0 --wpo 0 --rlhf_max_corpus_len 512", {}),
        ("--loss dpo --dpo_beta 0.05", {"loss": "dpo", "beta": 0.05}),
        ("--loss_type sigmoid --rpo_alpha 0.2", {"loss": "dpo", "sft_weight": 0.2}),
        ("--loss_type=sigmoid_norm", {"loss": "dpo", "loss_average": "mean"}),
        ("--pref_loss ipo --pref_beta 0.3 --pref_ftx 1", {"loss": "ipo", "beta": 0.3, "sft_weight": 1}),
        ("--loss_type kto --ref_model other.pth", {"loss": "kto", "reference": "other.pth"}),
    ],
)
def test_what_other_trainers_call_it(flags, today):
    assert parse([*REQUIRED, *flags.split()]) == dataclasses.replace(parse(REQUIRED), **today)


def test_a_translated_loss_leaves_a_note(capsys):
    parse([*REQUIRED, "--dpo", "1", "--rlhf_max_corpus_len", "512"])
    notes = capsys.readouterr().out
    assert "--dpo is --loss dpo --loss_average mean --beta 0.01 --sft_weight 0.1, as in RWKV-LM-RLHF" in notes
    assert "note: --rlhf_max_corpus_len is ignored: --ctx_len bounds a row" in notes
    parse([*REQUIRED, "--loss", "simpo", "--simpo_beta", "2"])
    assert "note: --simpo_beta is --beta\n" in capsys.readouterr().out
    parse([*REQUIRED, "--loss_type", "sigmoid"])
    assert "note: --loss_type sigmoid is --loss dpo\n" in capsys.readouterr().out
