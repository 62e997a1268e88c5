"""docs/library.md: its program runs as it stands there, on a small random model, and every trainer trains."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from .conftest import ROOT

NEEDED = ("transformers", "trl", "accelerate", "bitsandbytes")
pytestmark = [
    pytest.mark.rare,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, NEEDED)),
        reason=f"{' or '.join(NEEDED)} of the test extra is absent",
    ),
]
NAME = "Qwen/Qwen3-0.6B"
# torchrun's process group, without torchrun
ONE_PROCESS = {
    "init_process_group()": """init_process_group(
    "gloo", rank=0, world_size=1, store=torch.distributed.HashStore())"""
}
# before the page's program: the model that it names, in a folder
MODEL = """
import sys

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

letters = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
pieces = Tokenizer(models.BPE({piece: i for i, piece in enumerate(letters)}, []))
pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<eos>", pad_token="<pad>").save_pretrained("qwen")
torch.manual_seed(0)
sizes = dict(vocab_size=len(letters), hidden_size=64, intermediate_size=64, head_dim=32)
counts = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
Qwen3ForCausalLM(Qwen3Config(**sizes, **counts, eos_token_id=1, pad_token_id=0)).save_pretrained("qwen")
"""
# after it: what every file is worth
FACTS = """
import json

def moved(path):
    loaded = base()
    rwkv_miss.load_adapter(loaded, path)
    with torch.no_grad():
        return float((loaded(**batch).logits - base()(**batch).logits).abs().max())

files = ("adapter", "sft", "dpo", "grpo", "accelerate", "fsdp")
# TRL loads the base as the reference where it is to be had for each step
rows = Dataset.from_dict({"prompt": ["2 + 2 ="] * 8, "chosen": [" 4"] * 8, "rejected": [" 22"] * 8})
args = DPOConfig("out/two", max_steps=1, logging_steps=1, use_cpu=True)
two = DPOTrainer(start, args=args, train_dataset=rows, processing_class=tokenizer)
pairs = zip(two.ref_model.parameters(), base().parameters(), strict=True)
reference = all(torch.equal(one, other) for one, other in pairs)
two.train()
margins = [trainer.state.log_history[0]["rewards/margins"] for trainer in (dpo, two)]
print(json.dumps({"moved": {name: moved(f"{name}.pth") for name in files}, "reference": reference,
                  "margins": margins, "copy": dpo.ref_model is not None}))
"""


def test_every_block_runs_and_trains(tmp_path):
    text = (ROOT / "docs/library.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    assert blocks.count(NAME) == 1
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    code = blocks.replace(NAME, "qwen").replace(
        "learning_rate=1e-3", "learning_rate=1e-3, logging_steps=1, use_cpu=True"
    )
    for block, replaced in ONE_PROCESS.items():
        assert block in code
        code = code.replace(block, replaced)
    done = subprocess.run(
        [sys.executable, "-c", MODEL + code + FACTS],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert all(moved > 1e-6 for moved in facts["moved"].values()), facts
    assert facts["reference"] and not facts["copy"]
    # the first step of DPO compares the start with itself, or with the base
    assert facts["margins"][0] == 0 != facts["margins"][1]
