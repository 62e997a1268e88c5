"""The launch scripts of RWKV-PEFT (2024, 2025, 2026) and RWKV-LM, run as they stand: only paths, sizes,
number of steps and the device are others.

Where they come from: (a) the MiSS tutorial's miss.sh, (b) scripts/miss.sh, 2026, (c) scripts/run_disha.sh,
2025, (d) scripts/run_bone.sh, 2024, (e) demo/demo-lora.sh, 2024, (f) scripts/merge_bone.sh and
merge_disha.sh, (g) train_temp/demo-training-prepare.sh and demo-training-run.sh of RWKV-LM.
"""

import struct

import numpy as np
import pytest
import torch

from rwkv_miss import UserError, read_checkpoint, read_metadata
from rwkv_miss.__main__ import main as rwkv_miss_command
from src.config import parse
from src.data.recorded_tokenizer import recorded_tokenizer
from src.data.tokenizer import load_tokenizer
from src.planning.base_model import new_arch
from src.training.outputs import write_new_model

from . import program
from .conftest import read_rows, save_base, write_rows

pytestmark = pytest.mark.rare

SIZES = {"n_layer": "2", "n_embd": "64"}
ADAM = "--beta1 0.9 --beta2 0.99 --adam_eps 1e-8"

# the flags of each script in its own order, without what SIZES, paths and the device replace
MISS = (
    "--vocab_size 65536 --data_type jsonl --n_layer {n_layer} --n_embd {n_embd} --ctx_len 128 --micro_bsz 4"
    " --epoch_steps 2 --epoch_count 4 --epoch_save 1 --lr_init 1e-5 --lr_final 1e-5 --accelerator cpu"
    " --precision bf16 --devices 1 --strategy deepspeed_stage_1 --grad_cp 1 --my_testing x070 --peft miss"
    " --peft_config"
)
DISHA = (
    "--vocab_size 65536 --n_layer {n_layer} --n_embd {n_embd} --data_type binidx --dataload pad"
    " --loss_mask pad --ctx_len 96 --micro_bsz 8 --epoch_steps 2 --epoch_count 1 --epoch_begin 0"
    f" --epoch_save 1 --lr_init 2e-5 --lr_final 2e-5 --warmup_steps 0 {ADAM} --accelerator cpu --devices 1"
    " --precision bf16 --strategy deepspeed_stage_1 --grad_cp 1 --my_testing x060 --peft disha"
    " --disha_config"
)
BONE = (
    "--data_type binidx --vocab_size 65536 --ctx_len 96 --epoch_steps 2 --epoch_count 1 --epoch_begin 0"
    " --epoch_save 1 --micro_bsz 4 --n_layer {n_layer} --n_embd {n_embd} --pre_ffn 0 --head_qk 0"
    f" --lr_init 2e-5 --lr_final 2e-5 --warmup_steps 0 {ADAM} --accelerator cpu --devices 1 --precision bf16"
    " --strategy deepspeed_stage_1 --grad_cp 1 --my_testing x060 --dataload pad --loss_mask pad --peft bone"
    " --bone_config"
)
LORA = (
    "--data_type binidx --vocab_size 65536 --ctx_len 96 --epoch_steps 1 --epoch_count 2 --epoch_begin 0"
    " --epoch_save 1 --micro_bsz 8 --n_layer {n_layer} --n_embd {n_embd} --pre_ffn 0 --head_qk 0"
    f" --lr_init 5e-5 --lr_final 5e-5 --warmup_steps 0 {ADAM} --accelerator cpu --devices 1 --precision bf16"
    " --strategy deepspeed_stage_1 --grad_cp 1 --my_testing x060 --lora_load rwkv-0 --lora --lora_r 64"
    " --lora_alpha 128 --lora_dropout 0.01 --lora_parts=att,ffn,time,ln"
)
PREPARE = (
    "--data_type binidx --vocab_size 65536 --my_testing x070 --ctx_len 64 --train_stage 1 --epoch_count 1"
    " --epoch_begin 0 --epoch_save 1 --weight_decay 0 --head_size 64 --num_nodes 1 --micro_bsz 1 --n_layer"
    " {n_layer} --n_embd {n_embd} --my_exit_tokens 1498226207 --magic_prime 2926181 --lr_init 1e-5 --lr_final"
    " 1e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 --accelerator cpu --devices 1"
    " --precision bf16 --strategy deepspeed_stage_2 --grad_cp 1"
)
RUN = (
    "--my_testing x070 --ctx_len 64 --train_stage 3 --epoch_count 999999 --epoch_begin 0 --my_exit_tokens"
    " 1498226207 --magic_prime 2926181 --num_nodes 1 --micro_bsz 16 --n_layer {n_layer} --n_embd {n_embd}"
    " --lr_init 6e-4 --lr_final 6e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-18 --data_type"
    " binidx --vocab_size 65536 --weight_decay 0.001 --epoch_save 10 --head_size 64 --accelerator cpu"
    " --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 1 --enable_progress_bar True"
)


def write_binidx(prefix, documents):
    """Megatron's layout as json2binidx writes it, in uint16: a header, sizes, byte offsets and document
    bounds.
    """
    sizes = np.array([len(document) for document in documents], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(sizes[:-1], dtype=np.int64) * 2])
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(sizes), len(sizes) + 1))
        file.write(
            sizes.tobytes()
            + offsets.astype(np.int64).tobytes()
            + np.arange(len(sizes) + 1, dtype=np.int64).tobytes()
        )
    np.concatenate([np.array(document, dtype=np.uint16) for document in documents]).tofile(f"{prefix}.bin")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Bases of both versions with the World vocabulary, and the same 40 conversations as JSONL and as binidx,
    each ended by token 0.
    """
    folder = tmp_path_factory.mktemp("old")
    for version in (6, 7):
        sizes = {"n_embd": 64, "head_size": 64, "vocab_size": 65536}
        save_base(folder / f"v{version}.pth", version, torch.bfloat16, **sizes)
    texts = [f"User: what is {i} + {i}?\n\nAssistant: {2 * i}, because it is twice {i}." for i in range(40)]
    write_rows(folder / "roleplay.jsonl", ({"text": text} for text in texts))
    world = load_tokenizer("world", 65536)
    write_binidx(folder / "roleplay", [[*world.encode(text), 0] for text in texts])
    return folder


def words(script):
    return script.format(**SIZES).split()


def train(files, version, data, proj_dir, script, *rest):
    paths = [
        "--load_model",
        str(files / f"v{version}.pth"),
        *f"--proj_dir {proj_dir} --data_file {files}/{data}".split(),
    ]
    return program.succeed(program.run([*paths, *words(script), *rest]))


def steps(proj_dir):
    return read_rows(proj_dir / "metrics.jsonl")


def merge(files, version, flag, adapter, out):
    rwkv_miss_command(
        ["merge", "--base_model", str(files / f"v{version}.pth"), flag, str(adapter), "--output", str(out)]
    )
    base, merged = read_checkpoint(files / f"v{version}.pth"), read_checkpoint(out)
    assert [(name, t.shape, t.dtype) for name, t in merged.items()] == [
        (name, t.shape, t.dtype) for name, t in base.items()
    ]


@pytest.mark.parametrize("script, options", [("tutorial", ['{"r":64}']), ("2026", ['{"r":', "8}"])])
def test_miss(files, tmp_path, script, options):
    """(a) and (b): the options' JSON is cut up by the shell where it has spaces and no quotes."""
    output = train(files, 7, "roleplay.jsonl", tmp_path / script, MISS, *options)
    metadata = read_metadata(tmp_path / script / "adapter.pth")
    assert (metadata["method"], metadata["step"]) == ("miss", 8)
    assert metadata["options"]["rank"] == (64 if script == "tutorial" else 8)
    assert "--data_type is ignored" in output and "there it kept the first 2 documents" in output
    # `epoch_steps` documents were all that RWKV-PEFT trained on; here every one that is not held out
    assert "35 documents" in output and len(steps(tmp_path / script)) == 8


@pytest.mark.parametrize(
    "script, flags, method, passes, checkpoint",
    [
        (DISHA, ['{"mode":"bone","load":"","r":64}'], "miss", 0.457, "--peft_checkpoint"),
        (BONE, ['{"bone_load":"","bone_r":32}'], "bat", 0.229, "--lora_checkpoint"),
    ],
    ids=["run_disha.sh", "run_bone.sh"],
)
def test_bone_and_disha_and_their_merge(files, tmp_path, script, flags, method, passes, checkpoint):
    """(c), (d) and (f). Before it had modes, Bone was Bat."""
    output = train(files, 6, "roleplay", tmp_path / "run", script, *flags)
    metadata = read_metadata(tmp_path / "run/adapter.pth")
    rank = {"miss": 64, "bat": 32}[method]  # Bat's divides the widths
    assert (metadata["method"], metadata["options"]["rank"], metadata["step"]) == (method, rank, 2)
    assert "35 documents" in output and "--train_parts time,ln does" in output
    # flags that change nothing are in the run's folder
    assert "--data_type is ignored" not in output
    assert "\n--data_type is ignored" in (tmp_path / "run/script_notes.txt").read_text()
    assert f" over the data ({passes} if each row had one document, --packing 0)" in output, (
        "a row was a document there"
    )
    merge(files, 6, checkpoint, tmp_path / "run/adapter.pth", tmp_path / "merged.pth")


def test_lora_of_2024(files, tmp_path):
    """(e): the whole tensors of time and ln are trained with LoRA, and a pass is saved at its end."""
    output = train(files, 6, "roleplay", tmp_path / "run", LORA)
    metadata = read_metadata(tmp_path / "run/adapter.pth")
    assert (metadata["method"], metadata["step"]) == ("lora", 2)
    assert metadata["options"].items() >= {"rank": 64, "alpha": 128.0, "dropout": 0.01}.items()
    assert metadata["train_parts"] == ["ln", "time"]
    assert "blocks.1.ln2.weight" in read_checkpoint(tmp_path / "run/adapter.pth")
    assert "rwkv-0.pth is not there: a new adapter is trained" in output
    merge(files, 6, "--lora_checkpoint", tmp_path / "run/adapter.pth", tmp_path / "merged.pth")


def test_a_new_model_with_another_vocabulary_needs_no_tokenizer(tmp_path):
    """demo-training-prepare-v7-pile.sh: only the training needs one."""
    where = ["--proj_dir", str(tmp_path), "--data_file", "pile"]
    config = parse([*where, *words(PREPARE.replace("65536", "50304"))])
    arch, tokenizer = new_arch(config)
    assert (arch.vocab_size, tokenizer) == (50304, None)
    write_new_model(config, arch, tokenizer)
    metadata = read_metadata(tmp_path / "rwkv-init.pth")
    assert metadata["step"] == 0 and "tokenizer" not in metadata
    with pytest.raises(UserError, match="give --tokenizer"):
        recorded_tokenizer("auto", "", arch.vocab_size, str(tmp_path / "rwkv-init.pth"))


def test_rwkv_lm_prepares_and_trains(files, tmp_path):
    """(g): the first script makes a model and no step, the second trains it on the data once; run again it
    resumes where it stopped.
    """
    where = ["--wandb", "", "--proj_dir", str(tmp_path), "--data_file", str(files / "roleplay")]
    where += ["--eval_split", "0"]
    program.succeed(program.run([*where, *words(PREPARE)]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rwkv-init.pth"]
    output = program.succeed(program.run(["--load_model", "0", *where, *words(RUN)]))
    assert "rwkv-init.pth" in output
    assert "840 tokens" in output and len(steps(tmp_path)) == 1, (
        "14 rows of at most 64 tokens, in one step of 16"
    )
    trained, base = read_checkpoint(tmp_path / "model.pth"), read_checkpoint(tmp_path / "rwkv-init.pth")
    assert list(trained) == list(base) and not torch.equal(trained["head.weight"], base["head.weight"])
    assert "nothing to train" in program.succeed(program.run(["--load_model", "0", *where, *words(RUN)]))
