"""Command lines of RWKV-LM and RWKV-PEFT, flag by flag as their scripts have them: what they mean here."""

import re
import sys

import pytest
import yaml

from rwkv_miss import METHODS, UserError
from rwkv_miss.flags import parse_flags
from rwkv_miss.merging.cli import Merge
from rwkv_miss.methods.whole_tensors import split_parts
from src.config import AUTO, parse
from src.config.adapter_options import METHOD_ALIASES, AdapterOptions
from src.config.legacy import (
    DROPPED,
    NAMES,
    OPTIMIZERS,
    OTHER_RESULT,
    QUANTS,
    REFUSED,
    STRATEGIES,
    newest_model,
    translate,
)
from src.config.legacy.data_flags import LOSS_MASKS
from src.config.parse import flag_parser, read_flags
from src.run import main

from .tables import cases

REQUIRED = ["--load_model", "base.pth", "--data_file", "rows.jsonl"]


def all_notes(translated):
    """Return the notes of both lists that translate() returns with the words."""
    return [*translated[1].differences, *translated[1].translations]


ATTENTION = ["att.receptance", "att.key", "att.value", "att.output"]
# settings that a script of another project implies
METHOD = ["--peft", "miss"]
SAID = [*METHOD, "--warmup_steps", "0"]
BONE = '--peft bone --bone_config {"bone_mode":"bone","bone_r":8}'


def read(*flags):
    """Read flags: one text, or their words."""
    return parse([*REQUIRED, *(flags[0].split() if len(flags) == 1 else flags)])


def mistake(*flags):
    with pytest.raises(UserError) as caught:
        read(*flags)
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_a_flag_that_would_change_the_result_is_refused_with_the_way_out(name):
    harmless, reason = REFUSED[name]
    assert mistake(f"--{name}", "7") == mistake(f"--{name}=7") == f"--{name} 7: {reason}"
    for value in harmless:
        assert read(*SAID, f"--{name}={value}") == read(*SAID)


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--head_size_divisor 4", "8 is fixed here"),
        ("--smoothing 0.1", "the cross entropy is not smoothed here"),
        ("--grpo_gen_topp 0.7", "answers are drawn at temperature 1 from the whole distribution"),
        ("--grpo_gen_temperature 0.9", "answers are drawn at temperature 1 from the whole distribution"),
    ],
)
def test_what_docs_interop_promises_to_stop_the_run(flag, words):
    assert mistake(*flag.split()).startswith(f"{flag}: {words}")


def test_flags_without_a_meaning_here_get_one_note_each(capsys):
    flags = [word for name in DROPPED for word in (f"--{name}", "17")]
    del flags[1]  # a flag without its value is no reason to swallow the next one
    assert parse([*flags, "--kernel=17", "--verbose=1", *REQUIRED, *SAID]) == read(*SAID, "--verbose=1")
    said = capsys.readouterr().out
    named = re.findall(r"^note: --(\w+) is ignored: .", said, re.MULTILINE)
    # flags whose effect is missing come first
    assert set(named[: len(OTHER_RESULT)]) == OTHER_RESULT and sorted(named) == sorted(DROPPED)
    assert "unrecognized arguments: stray" in mistake("--kernel=0", "stray")


RANK_48 = """
    --peft bone --bone_config {"bone_mode":"bone","bone_load":"","bone_r":48}
    --peft disha --disha_config {"mode":"bone","load":"","r":48}
    # cut up by the shell
    --peft disha --disha_config {"mode":"bone", "load":"", "r":48}
    --peft miss --peft_config {"r": 48}
    --peft miss --miss_config={"r":48}
    --rank 48
    --peft miss --r=48
"""


@pytest.mark.parametrize("flags", [flags for (flags,) in cases(RANK_48)])
def test_the_ranks_of_three_generations(flags):
    values = read(f"{flags} --micro_bsz 3")
    assert values.adapter == AdapterOptions("miss", {"r": 48}, None) and values.micro_bsz == 3


def test_options_of_another_method_are_named(capsys):
    values = read(f"{BONE} --verbose --lora_config " + '{"lora_r":4} --lora_r 2')
    assert values.adapter == AdapterOptions("miss", {"r": 8}, None)
    notes = capsys.readouterr().out
    assert "--lora_config is ignored: it is for --peft lora, and the run has miss" in notes
    assert "--lora_r is ignored" in notes
    assert "whose names contain time or ln stay frozen" in notes


def test_the_mode_bat_has_blocks_of_inputs():
    for flags in (
        '--peft bone --bone_config {"bone_mode":"bat","bone_load":"","bone_r":8}',
        '--peft disha --disha_config {"mode":"bat","load":"","r":8}',
        '--peft bone --bone_config {"bone_load":"","bone_r":8}',  # before there were modes
    ):
        values = read(flags)
        assert values.adapter == AdapterOptions("bat", {"r": 8, "order": "row"}, None)


def test_lora_in_json_and_in_the_oldest_spelling(capsys):
    wanted = {"r": 64, "alpha": 128, "dropout": 0.01}
    options = '{"lora_load":"rwkv-0","lora_r":64,"lora_alpha":128,"lora_dropout":0.01}'
    values = read(f"--peft lora --lora_config {options}")
    assert values.adapter == AdapterOptions("lora", wanted, None)
    assert "rwkv-0.pth is not there" in capsys.readouterr().out
    values = read(
        "--lora_load rwkv-0 --lora --lora_r 64 --lora_alpha 128 --lora_dropout 0.01 --lora_parts=att,ffn"
    )
    assert values.adapter == AdapterOptions("lora", wanted, None)
    values = read("--lora", "--lora_parts=att")
    assert values.adapter == AdapterOptions("lora", {"r": 8, "alpha": 32}, ATTENTION)


def test_pissa_in_json_and_in_the_oldest_spelling(capsys):
    for flags in (
        '--peft pissa --pissa_config {"pissa_load":"","pissa_init":"","pissa_r":32,"svd_niter":7}',
        "--lora --PISSA --svd_niter 7 --lora_r 32 --lora_alpha 64 --lora_parts=att,ffn",
    ):
        values = read(flags)
        parsed = METHODS["pissa"].Options.parse(values.adapter.options)
        assert (values.peft, values.adapter.targets) == ("pissa", None)
        assert (parsed.rank, parsed.niter, parsed.scale) == (32, 7, 1.0)
    assert "--lora_alpha is ignored: PiSSA has the factor 1" in capsys.readouterr().out
    assert read("--PISSA", "--lora_parts=att,ffn").adapter.options == {"r": 8, "niter": 4}


def test_an_adapter_of_theirs_is_what_the_run_begins_with(tmp_path, capsys):
    (tmp_path / "rwkv-0.pth").write_bytes(b"theirs")
    words = ["--proj_dir", str(tmp_path), "--lora_load", "rwkv-0", "--lora", "--lora_parts", "att,ffn"]
    assert read(*words).init_adapter == f"{tmp_path / 'rwkv-0.pth'}"
    assert "the run begins with the adapter in" in capsys.readouterr().out
    options = '{"pissa_load":"rwkv-0","pissa_r":8}'
    flags = ["--proj_dir", str(tmp_path), "--peft", "pissa", "--pissa_config", options]
    assert read(*flags).init_adapter.endswith("rwkv-0.pth")


def test_epochs_and_saving(capsys):
    values = read("--epoch_steps 200 --epoch_count 3 --epoch_begin 0 --epoch_save 2 --warmup_steps -1")
    assert (values.epoch_steps, values.epoch_count) == (200, 3)
    assert (values.save_steps, values.warmup_steps) == (400, 0)
    capsys.readouterr()
    assert read("--epoch_save", "1").save_steps == -1 and "--save_steps -1" in capsys.readouterr().out
    assert read("--epoch_steps", "5", "--epoch_save", "2", "--save_steps", "3").save_steps == 3
    assert read("--op", "fla").wkv == "auto" and read("--op", "cuda").wkv == "cuda"


def test_quantised_bases(capsys):
    meant = {"none": "none", "0": "none", "int8": "int8", "nf4": "nf4"}
    assert {kind: read("--quant", kind).quant for kind in meant} == meant
    assert read("--quant=") == read() and "note" not in capsys.readouterr().out
    for kind in ("4bit", "fp4"):
        assert read("--quant", kind).quant == read(f"--quant={kind}").quant == "nf4"
        assert f"note: --quant {kind}: nf4 is taken instead of fp4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "mask, today, words",
    [
        ("none", "all", "trains every token; padding, which is trained there, is not"),
        ("", "all", "trains every token; padding, which"),
        (
            "pad",
            "all",
            "trains every token but the padding: --loss_mask all; assistant trains the answers alone",
        ),
        (
            "qa",
            "Assistant:",
            "trains what follows Assistant: until the next turn; a document without this word is trained"
            " whole there, and only its end here: --loss_mask Assistant:",
        ),
    ],
)
def test_masks_train_what_they_train_there(mask, today, words, capsys):
    assert read(f"--loss_mask={mask}").loss_mask == today
    assert f"note: --loss_mask {mask or repr('')} {words}" in capsys.readouterr().out
    assert read("--loss_mask", mask, "--data_type", "sft", "--verbose").loss_mask == "assistant"
    assert (
        f"note: --loss_mask {mask or repr('')} is ignored with --data_type sft, there as well"
        in capsys.readouterr().out
    )


def test_todays_flags_stay_as_they_are():
    """--warmup_steps -1 is an automatic choice, which other projects do not have."""
    flags = ["--peft", "miss", "--warmup_steps", "-1", "--epoch_count", "0"]
    words, notes = translate(flags)
    assert words == flags and not (notes.differences or notes.translations)


NOTES = """
    --peft bone                                 --peft bone is --peft miss, its name today
    --peft=disha                                --peft disha is --peft miss
    --epoch_steps 10 --epoch_save 1  --epoch_save 1 is --save_steps 10: 1 x 10 steps of an epoch
    --epoch_begin 0 --warmup_steps -1           --warmup_steps 0, as there
    --rank 8                                    --rank 8 is --peft_config r=8
    --peft bone --bone_config {"bone_mode":"bone","bone_r":8}  --bone_config is --peft_config
    --lora --lora_parts att,ffn                 --lora and its flags are --peft lora with --peft_config
    --PISSA --lora_parts att,ffn                --PISSA and its flags are --peft pissa with --peft_config
    --emb                                       --emb is --train_parts emb
    --train_type state                          the state alone is trained: --peft state
    --peft lora --state_tune  the state is trained with the adapter: --train_parts state
    --train_type infctx                         --train_type infctx is --chunk_ctx 512: rows run in chunks
    --train_stage 1                             --train_stage 1 is --peft none --init_only 1
"""


@pytest.mark.parametrize("flags, note", cases(NOTES))
def test_a_translated_flag_leaves_a_note(flags, note, capsys):
    _, notes = translate(flags.split())
    assert any(said.startswith(note) for said in notes.translations)


def test_notes_that_change_the_result_come_first_and_many_others_stay_for_the_folder(tmp_path, capsys):
    flags = (
        "--epoch_begin 0 --magic_prime 3 --num_workers 1 --data_type binidx --warmup_steps 0 --dataload pad"
    )
    config = read(*flags.split(), "--proj_dir", str(tmp_path))
    said = capsys.readouterr().out.splitlines()
    changes = ['note: "there" is', "note: a row was one document there;", "note: of 100 documents or more"]
    assert all(line.startswith(begin) for line, begin in zip(said, changes, strict=False))
    assert said[3:] == [
        f"note: 5 more notes change nothing in the result; the run writes them to {tmp_path}/script_notes.txt"
        ", and --verbose prints them"
    ]
    assert len(config.script_notes) == 8 and config.script_notes[3].startswith("--epoch_begin is ignored")
    assert [f"note: {note}" for note in config.script_notes[:3]] == said[:3]
    # few are printed, and all of them with --verbose or where a refusal may need them
    assert not read("--magic_prime", "3", *METHOD).script_notes
    assert not read(*flags.split(), "--verbose", "1").script_notes
    capsys.readouterr()
    mistake(*flags.split(), "--beta1", "2")
    assert "--magic_prime is ignored" in capsys.readouterr().out


def test_a_run_that_an_error_ends_leaves_the_notes_in_its_folder(tmp_path):
    flags = "--epoch_begin 0 --magic_prime 3 --num_workers 1 --warmup_steps 0 --dataload pad".split()
    run = tmp_path / "run"
    config = read(*flags, "--load_model", str(tmp_path / "absent.pth"), "--proj_dir", str(run))
    with pytest.raises(UserError, match="absent.pth does not exist"):
        main(config)
    assert (run / "script_notes.txt").read_text().splitlines() == list(config.script_notes)
    other = read("--load_model", str(tmp_path / "absent.pth"), "--proj_dir", str(run))
    with pytest.raises(UserError, match="absent.pth does not exist"):
        main(other)
    assert not list(run.iterdir()), "the notes were of another command"


def test_an_epoch_is_split_over_the_devices():
    flags = "--epoch_begin 0 --devices 4 --epoch_steps 200 --epoch_save 1".split()
    words, notes = translate(flags)
    assert words[-2:] != ["--epoch_steps", "200"] and "--epoch_steps 50" in " ".join(words)
    assert "--save_steps 50" in " ".join(words)
    said = (
        "--epoch_steps 200 counted forward passes of 4 devices there, of which a step has 4: --epoch_steps 50"
    )
    assert said in notes.translations


def test_masks():
    assert read("--loss_mask", "all").loss_mask == "all"
    assert read("--loss_mask", "assistant").loss_mask == "assistant"


def test_infctx(capsys):
    assert read("--train_type", "infctx").chunk_ctx == 512
    for flags in ("--train_type=infctx --chunk_ctx 64", "--chunk_ctx 64"):
        assert read(flags).chunk_ctx == 64
    assert "ignored" not in capsys.readouterr().out
    whole = read(*SAID)
    assert read(*SAID, "--train_type", "none", "--chunk_ctx", "64") == read(*SAID, "--train_type=") == whole
    assert "--chunk_ctx 64 is ignored: --train_type none" in capsys.readouterr().out


def test_the_stages_of_rwkv_lm(tmp_path, capsys):
    folder = str(tmp_path)
    common = f"""--proj_dir {folder}
        --data_file data --data_type binidx --vocab_size 65536 --my_testing x070 --n_layer 2 --n_embd 64
        --head_size 64 --my_exit_tokens 1498226207 --magic_prime 2926181 --strategy deepspeed_stage_2
    """.split()
    stage_1 = "--train_stage 1 --epoch_count 1 --epoch_save 1 --micro_bsz 1"
    first = parse([*common, "--wandb", "", *stage_1.split()])
    assert (first.peft, first.init_only, first.load_model, first.version) == ("none", True, "", "x070")
    with pytest.raises(UserError, match="make one with --train_stage 1"):
        parse([*common, "--load_model", "0", "--train_stage", "3"])
    for name in ("rwkv-init.pth", "rwkv-7.pth", "rwkv-10.pth"):
        (tmp_path / name).touch()
        assert newest_model(folder) == str(tmp_path / name)
    for name in ("rwkv-final.pth", "rwkv-x.pth"):
        (tmp_path / name).touch()
        assert newest_model(folder) == str(tmp_path / "rwkv-10.pth")
    stage_3 = "--load_model 0 --train_stage 3 --epoch_count 999999 --epoch_save 10 --micro_bsz 16"
    run = parse([*common, *stage_3.split()])
    assert (run.peft, run.init_only, run.resume, run.epoch_count) == ("none", False, "auto", 1)
    assert run.load_model.endswith("rwkv-10.pth") and run.save_steps == 10 * 40320 // 16


def test_todays_command_line_passes_unchanged():
    words = "--load_model a --data_file=b --peft_config=r=8,targets=key+value --grad_cp 1 stray".split()
    kept, notes = translate(words)
    assert kept == words and not (notes.differences or notes.translations)
    assert not NAMES & {word.removeprefix("--").partition("=")[0] for word in words}
    assert set(METHOD_ALIASES.values()) == {"miss"}


def test_names_of_the_optimizer(capsys):
    for words in (["--optim", "adam8bit"], ["--optimizer=adamw_8bit"], ["--optimizer", "adamw8bit"]):
        assert read(*words).optimizer == "adamw8bit", words
    assert "note: the optimizer adamw_8bit is --optimizer adamw8bit\n" in capsys.readouterr().out
    assert read("--optim", "none").optimizer == read("--optimizer=").optimizer == "adamw"
    assert all_notes(translate(["--optim", "muon"])) == ["--optim muon is --optimizer muon"]


def test_a_command_line_of_today_reads_no_translator(monkeypatch):
    parser = flag_parser("train.py", "")
    assert not NAMES & {flag.removeprefix("--") for flag in parser._option_string_actions}
    monkeypatch.setitem(sys.modules, "src.config.legacy", None)  # importing it fails
    today = "--load_model a --data_file=b --peft_config r=8,targets=key+value --grad_cp 1 --verbose"
    assert read_flags(parser, today.split())["load_model"] == "a"
    foreign = {
        "loss_mask": [*LOSS_MASKS, "se"],
        "quant": [*QUANTS, "1"],
        "optimizer": OPTIMIZERS,
        "strategy": STRATEGIES,
        "peft": METHOD_ALIASES,
        "op": ["fla", "triton"],
        "random_seed": ["-1"],
        "load_model": ["0"],
        "train_parts": ["none", "[]", '["ln", "time"]'],
    }
    words = [[f"--{name}={value}"] for name, values in foreign.items() for value in values]
    words += [["--train_parts", "time", "ln"], ["--peft_config", "{r:", "8}"], ["--lora"], ["stray"]]
    for argv in words:
        with pytest.raises(ImportError):
            read_flags(parser, argv)


def test_parts_in_addition_to_the_adapter_in_three_spellings(capsys):
    for words in (["--train_parts", "time ln"], ["--train_parts", "time", "ln"], ["--train_parts=ln,time"]):
        assert split_parts(read(*BONE.split(), *words).train_parts) == ["ln", "time"]
    assert "stay frozen" not in capsys.readouterr().out
    assert read("--train_parts", "none").train_parts == ""
    assert read("--lora --lora_r 8").train_parts == "ln,time", "the default of --lora_parts was att,ln,time"
    assert read("--lora", "--lora_parts", "att,ffn", "--emb").train_parts == "emb"
    assert split_parts(read("--emb", "--train_parts", "ln time").train_parts) == ["emb", "ln", "time"]


@pytest.mark.parametrize("flag", [["--train_type", "state"], ["--state_tune"]])
def test_state_tuning_alone_and_with_an_adapter(flag):
    for method in ([], ["--peft", "none"], ["--peft", "state"]):
        assert (values := read(*flag, *method)).peft == "state" and values.train_parts == "auto"
    values = read(*BONE.split(), *flag)
    assert (values.peft, values.train_parts) == ("miss", "state")
    values = read("--lora", *flag)
    assert (values.peft, values.train_parts) == ("lora", "ln,time,state")


@pytest.mark.parametrize("adapter", ["--lora_checkpoint", "--peft_checkpoint"])
def test_the_merge_scripts(adapter):
    args = parse_flags(Merge, ["--base_model", "base.pth", adapter, "rwkv-0.pth", "--output", "merged.pth"])
    assert (args.base, args.adapter, args.out) == ("base.pth", ["rwkv-0.pth"], "merged.pth")


LORA = "--lora --lora_r 8"
DECAY = "--lr_init 1 --lr_final 0.01 --epoch_begin 0"
# flags, the settings that they mean today (YAML), and a part of the note
SCRIPTS = """
    # no --peft is full training there, with a base or with a new model
    --epoch_begin 0  {peft: none}  no --peft is full training there: --peft none
    --load_model= --my_testing x060 --n_layer 2 --n_embd 64 --data_type sft\
        {peft: none, load_model: "", version: x060}  of a new model without --load_model: --peft none
    --train_type finetune  {peft: none}  full training
    # of a fully trained RWKV-7 RWKV-PEFT doubles no rate, RWKV-LM that of w0
    --epoch_begin 0 --my_testing x070  {lr_map: {att.w0: 0.5}}  w0, the base decay, learns at the usual
    --epoch_begin 0 --my_testing x070 --lr_map ffn=2  {lr_map: {ffn: 2}}
    --epoch_begin 0 --my_testing x060  {peft: none, lr_map: AUTO}
    --epoch_begin 0 --my_testing x070 --state_tune  {peft: state, lr_map: AUTO}
    --my_testing x070 --train_stage 3 --load_model a.pth  {peft: none, lr_map: AUTO}
    LORA --epoch_begin 0  {peft: lora}
    --state_tune  {peft: state}
    --data_type jsonl --peft_config r=8  {peft: miss}
    --layer_profile 24.csv --dpo 1  {peft: miss, loss: dpo}  --peft, --peft_config
    # of 2024, of 2025, and cosines by tokens
    DECAY  {lr_schedule: exp, warmup_steps: 0}  --lr_schedule exp, which is 0.1 halfway
    DECAY --lr_final 0  {lr_schedule: linear, lr_final: 0}  --lr_schedule linear, which is 0.5 halfway
    DECAY --lr_final 1  {lr_schedule: auto}
    DECAY --lr_final -1  {lr_schedule: auto, lr_final: -1}
    DECAY --op fla  {lr_schedule: cos}
    DECAY --peft disha --disha_config {"mode":"bone","r":8}  {lr_schedule: cos}\
        the rate is a cosine, 0.505 halfway, as since the middle of 2025 there; before, it was\
 --lr_schedule exp, 0.1 halfway
    DECAY --my_exit_tokens 99  {lr_schedule: auto, epoch_count: 1}\
        --my_exit_tokens 99 ends the run there after that many tokens, and the cosine with it; here both
    DECAY --lr_schedule cos_decay  {lr_schedule: cos, lr_final: 0.01}
    DECAY --lr_schedule wsd  {lr_schedule: cos, lr_final: 0, warmup_steps: 100}\
        --lr_schedule cos --lr_final 0, which is 0.5 halfway
    DECAY --peft_config r=8 --epoch_count 4  {lr_schedule: cos}
    --lr_init 1 --epoch_begin 0  {lr_final: 1.0e-5}  no --lr_final is --lr_final 1e-05
    DECAY --warmup_steps 7  {warmup_steps: 7}
    # steps and rows
    --epoch_begin 0 --epoch_steps 100 --accumulate_grad_batches 4 --epoch_save 2\
        {epoch_steps: 25, save_steps: 50}\
        --epoch_steps 100 counted forward passes there, of which a step has 4: --epoch_steps 25
    --data_type jsonl --peft_config r=8 --epoch_steps 9  {epoch_steps: 9}  there it kept the first 9 documents
    --data_type sft --peft_config r=8 --epoch_steps 9  {epoch_steps: 9}  there --data_type sft did not read it
    --dataload pad --epoch_steps 100 --epoch_count 4 --micro_bsz 8 --devices 2  {epoch_steps: 50}\
        all epochs read the first 800 documents there; here they go on through all data
    --data_type sft --epoch_steps 10  {epoch_steps: 10}  all epochs read the first 120 documents there
    --data_type jsonl  {packing: true}  a row was one document there
    --data_type jsonl --peft lora  {packing: true}  here a document has an end token, and a long text becomes
    --dataload pad  {packing: true}  --packing 0 does as there
    --dataload get  {packing: true}  --dataload get is ignored: a row began anywhere
    --dataload pad --packing 0  {packing: false}
    --epoch_begin 0  {eval_split: AUTO}  --eval_split 0 trains all, as there
    --data_type sft  {template: auto}\
        a line break and \\x17 after an answer; here it is User: and Assistant:. --template alpaca has
    # parts
    LORA --lora_parts=att --my_testing x060\
        {peft_config: {r: 8, alpha: 32, targets: [att.receptance, att.key, att.value, att.output,\
 att.gate]}, train_parts: auto}
    LORA --lora_parts=ffn,ln --my_testing x060\
        {peft_config: {r: 8, alpha: 32, targets: [ffn.key, ffn.value, ffn.receptance]}, train_parts: ln}
    LORA --lora_parts=att,ffn,time,ln --my_testing x070  {train_parts: ln}\
        time of --lora_parts is ignored: no tensor of RWKV-7
    --peft bone --bone_config {"bone_mode":"bone","bone_r":8} --my_testing x070  {train_parts: auto}\
        names contain ln stay frozen
    --peft lora --lora_config {"lora_r":8,"lora_parts":"att,ffn"} --train_parts []\
        {peft_config: {r: 8}, train_parts: ""}
    --peft pissa --pissa_config {"pissa_r":8,"pissa_parts":"ffn"} --my_testing x070\
        {peft_config: {r: 8, targets: [ffn.key, ffn.value]}}
    --peft lora --train_parts=["time","ln"]  {train_parts: "time,ln"}
    LORA --lora_parts=att,ffn --train_parts time ln --my_testing x070  {train_parts: ln}\
        time of --train_parts is ignored: no tensor of RWKV-7 has it in its name
    --peft lora --train_parts=["time","ln"] --rwkv_version x070 --emb  {train_parts: "ln,emb"}
    --peft lora --train_parts time --dataload pad --version x070  {train_parts: ""}
    --peft lora --train_parts time ln --dataload pad --my_testing x060  {train_parts: time ln}
    --peft lora --peft_config r=8 --train_parts time,ln --data_type sft --my_testing x070\
        {train_parts: "time,ln"}
    # what 2026 leaves in the folder
    --merge 1 --peft_config r=8  {peft: miss}  a merged rwkv-N.pth there; here the run leaves an adapter
    --epoch_begin 0 --peft_config r=8  {peft: miss}  --merge 1, the default of 2026, leaves a merged
    --merge 1 --peft none  {peft: none}  --merge 1 is ignored: the run leaves the whole model
    --merge 0 --peft_config r=8  {peft: miss}  --merge 0 is ignored: the run leaves the adapter
    # names
    --my_pile_stage 3 --load_model a.pth  {resume: auto}  --my_pile_stage 3 is --peft none
    --rwkv_version x070  {version: x070}  the names today are --my_testing x070
    --strategy single_device  {strategy: auto}  the names today are --strategy auto
    --random_seed -1  {random_seed: 42, peft: miss}  --random_seed -1 is a seed by chance
    --train_type states  {peft: state}
    --peft lora --quant fp8  {quant: int8}  int8 is taken instead of fp8
    # of RWKV-LM-RLHF
    --layer_profile a.csv --quant 1 --quant_mode nf4 --infctx 1 --chunk_ctx 64 --state 0\
        {quant: nf4, chunk_ctx: 64, peft: miss, train_parts: auto}  --quant 1 is --quant nf4
    --layer_profile a.csv --state 1  {peft: miss, train_parts: state}  the state is
    --layer_profile a.csv --infctx 0 --chunk_ctx 64 --quant 0  {chunk_ctx: 0}  --infctx 0
    --data_file= --layer_profile a --sft 1 --sft_jsonmode 1 --train_data_file talks\
        {data_file: talks, loss_mask: assistant}\
        --train_data_file is --data_file talks, a folder of JSONL. All its tokens are trained there; here
    --layer_profile a --grpo 1 --grpo_gen_count 6 --grpo_gen_topp 1 --rlhf_train_file b\
        {loss: grpo, group_size: 6, max_tokens: 1024, beta: 0.1, grpo_type: grpo}\
        --rlhf_train_file is ignored: --data_file is given
"""


@pytest.mark.parametrize("flags, today, note", cases(SCRIPTS))
def test_what_a_script_leaves_out_and_what_it_says(flags, today, note, capsys):
    config, today = read(*flags.replace("LORA", LORA).replace("DECAY", DECAY).split()), yaml.safe_load(today)
    meant = {name: AUTO if value == "AUTO" else value for name, value in today.items()}
    assert {name: getattr(config, name) for name in today} == meant
    said = capsys.readouterr().out + "\n".join(config.script_notes)
    assert note in said and all(len(line) < 200 for line in said.splitlines())


@pytest.mark.parametrize(
    "flags, claim",
    [
        ("--lr_init 1 --lr_final 0.01 --peft_config r=8 --epoch_begin 0 --epoch_count 4", "halfway"),
        ("--data_type sft --peft_config r=8 --epoch_steps 20", "kept the first"),
        ("--data_type sft --peft_config r=8", "alpaca does as there"),
        ("--train_stage 3 --my_exit_tokens 99", "is the data once"),
        ("--dataload pad --epoch_steps 9 --epoch_count 1", "all epochs read"),
        ("--dataload get --epoch_steps 9", "all epochs read"),
        ("--data_type jsonl --peft_config r=8 --epoch_steps 9", "all epochs read"),
    ],
)
def test_notes_claim_nothing_that_is_false_of_the_trainer(flags, claim):
    """Since 000d9be the cosine of 2026 takes the whole run; --data_type sft takes every row.

    A row of --dataload get begins anywhere, in each epoch anew.
    """
    assert not any(claim in note for note in all_notes(translate([*REQUIRED, *flags.split()])))


@pytest.mark.parametrize(
    "flags", [["--num_workers", "4"], ["--loss_type", "ipo"], ["--rank", "8"], ["--dpo"]]
)
def test_old_flags_that_people_type_for_this_program_imply_nothing(flags):
    config = read(*flags)
    assert (config.peft, config.warmup_steps, config.lr_schedule) == ("miss", AUTO, "auto")


def test_what_a_preset_or_a_file_gives_is_not_left_out(tmp_path):
    values = read("--epoch_begin", "0", "--preset", "paper-table7")
    assert (values.peft, values.lr_init) == ("miss", 2e-5)
    (tmp_path / "run.yaml").write_text("peft: lora\nwarmup_steps: 3\n")
    values = read("--epoch_begin", "0", "--config", str(tmp_path / "run.yaml"))
    assert (values.peft, values.warmup_steps) == ("lora", 3)


def test_a_new_model_that_is_only_written_needs_no_notes_about_its_training(capsys):
    parse("--my_pile_stage 1 --my_testing x070 --n_layer 2 --n_embd 64 --data_file a".split())
    assert capsys.readouterr().out == "note: --my_pile_stage 1 is --peft none --init_only 1\n"


def test_columns_of_data_sets():
    values = read("--sft_field", "query", "response", "--sft_split", "test")
    assert values == read("--sft_field=query,response", "--sft_split=test")
    assert (values.sft_field, values.sft_split, read().sft_split) == ("query,response", "test", "train")


@pytest.mark.parametrize(
    "flags, trainer",
    [
        ("--my_testing x070 --train_stage 3", "RWKV-LM"),
        ("--my_testing x070 --dataload pad", "RWKV-PEFT or RWKV-LM"),
        ("--my_testing x070 --layer_profile a.csv", "RWKV-LM-RLHF"),
    ],
)
def test_notes_name_the_trainer_that_they_call_there(flags, trainer):
    notes = all_notes(translate(["--load_model", "base.pth", "--data_file", "x", *flags.split()]))
    assert notes[0] == f'"there" is {trainer}, for which this command was written'
    assert not any(note.startswith('"there"') for note in all_notes(translate(["--load_model", "base.pth"])))
