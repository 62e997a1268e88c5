"""A checkpoint that others trained (../shared/data/real), taught something new: from a data file to logits in
another runtime.
"""

import pytest
import torch

from rwkv_miss import load_adapter, merge_file, read_checkpoint
from src.common.token_loss import loss_sum
from src.model import RWKV

from . import program
from .conftest import close, pypi_rwkv, write_rows


@torch.no_grad()
def nats_per_character(model, pieces):
    """utf16 has two ids a character; the first id of a piece has nothing before it and is not counted."""
    ids = torch.tensor([list(piece.encode("utf-16-le")) for piece in pieces])
    loss = loss_sum(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())
    return float(loss) / sum(map(len, pieces))


@pytest.mark.rare
def test_miss_teaches_an_english_rwkv6_shakespeare(data_dir, tmp_path):
    base, merged = data_dir / "real/rwkv6-3m-utf16.pth", tmp_path / "merged.pth"
    text = (data_dir / "tinyshakespeare.txt").read_text()
    pieces = [text[i : i + 200] for i in range(0, len(text) - 200, 200)]
    seen, heldout = pieces[:4800:60], pieces[-20:]
    write_rows(tmp_path / "data.jsonl", ({"text": text} for text in seen))
    flags = (
        f"--load_model {base} --data_file {tmp_path}/data.jsonl --proj_dir {tmp_path}/run --tokenizer utf16"
    )
    flags += " --tokenizer utf16 --packing 0 --eval_split 0 --peft_config r=16 --micro_bsz 4 --ctx_len 512"
    program.succeed(program.run([*flags.split(), "--lr_init", "3e-3", "--warmup_steps", "5"]))
    adapter = tmp_path / "run/adapter.pth"
    merge_file(base, adapter, merged, "fp32")

    untouched, live = (RWKV.load(base, torch.float32) for _ in range(2))
    load_adapter(live, adapter)
    before, after = (nats_per_character(model, heldout) for model in (untouched, live))
    print(f"nats per character of held-out Shakespeare: {before:.3f} before, {after:.3f} after")
    assert after < before - 0.5

    old, new = read_checkpoint(base), read_checkpoint(merged)
    assert [(name, t.shape) for name, t in new.items()] == [(name, t.shape) for name, t in old.items()]
    ids = list(heldout[0].encode("utf-16-le"))
    with torch.no_grad():
        # an fp32 file, because the package normalises the embedding of v6 in the file's dtype
        got, want = pypi_rwkv(merged)(ids)[0], live(torch.tensor([ids]))[0][0]
    close("merged file in the rwkv package, and unmerged adapter", got, want, 1e-4)
