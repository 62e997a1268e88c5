#!/usr/bin/env bash
# Fine-tune, merge, verify, chat: the whole way on a CPU in a few minutes. Nothing need be set up before.
# The base, demo/rwkv7-reverse.pth, reverses strings of letters; the adapter teaches it to sort them.
# For a run of your own change load_model, data_file and proj_dir, and look at the other settings once.
set -euo pipefail
source "$(dirname "$0")/../scripts/setup.sh" ""

load_model="demo/rwkv7-reverse.pth"     # the base: any RWKV-6 or RWKV-7 .pth; its sizes are read from the file
proj_dir="out/demo"                     # everything the run writes goes here
data_file="$proj_dir/sort.jsonl"        # JSONL, one {"text": ...} or {"messages": [...]} a line; made below if it is absent
heldout_file="$proj_dir/sort-heldout.jsonl"  # questions that are not in data_file, for the accuracy; may be absent
tokenizer="auto"                        # auto, world, bytes, utf16, or a file; the demo's base says in its file that it is bytes
peft="miss"                             # the adapter method
peft_config='{"r": 12}'                 # its options: r is the rank, an eighth of this model's width; 64 for real models
micro_bsz=16                            # rows at once; the first thing to lower when memory runs out (then: grad_cp=2)
ctx_len=128                             # tokens in a row, which short documents share; 512 to 4096 for real data
epoch_steps=300                         # optimizer steps; 0: the whole data once
lr_init=5e-3                            # learning rate; small models want more, real ones 2e-5 to 1e-4
strategy="deepspeed_stage_1"            # auto, deepspeed_stage_1, _2, _3 or ddp
devices=1                               # GPUs, or processes on a CPU
threads=1                               # CPU threads; 1 suits this tiny model, delete the export below for a real one

export OMP_NUM_THREADS="$threads"
mkdir -p "$proj_dir"
[ -f "$data_file" ] || python -m demo.task sort --rows 20000 --out "$data_file" --heldout 500 --heldout_out "$heldout_file"

# a second call finds the finished run and goes on to the merge; nothing is ever deleted
set -x
python train.py --load_model "$load_model" --data_file "$data_file" --proj_dir "$proj_dir" --tokenizer "$tokenizer" \
    --peft "$peft" --peft_config "$peft_config" --micro_bsz "$micro_bsz" --ctx_len "$ctx_len" --epoch_steps "$epoch_steps" \
    --lr_init "$lr_init" --warmup_steps 20 --strategy "$strategy" --devices "$devices" --resume auto
python -m rwkv_miss merge --base "$load_model" --adapter "$proj_dir/adapter.pth" --out "$proj_dir/merged.pth"
python -m demo.chat --model "$proj_dir/merged.pth" --prompt "sort kitchen" --temperature 0
{ set +x; } 2>/dev/null
[ -f "$heldout_file" ] || exit 0
echo "checking the held-out questions with the base, base + adapter, and the merged file"
python -m demo.verify --base "$load_model" --adapter "$proj_dir/adapter.pth" --merged "$proj_dir/merged.pth" \
    --questions "$heldout_file" --summary "$proj_dir/run.json"
