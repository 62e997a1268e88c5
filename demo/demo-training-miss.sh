#!/usr/bin/env bash
# Fine-tune, merge, verify and chat on a CPU in a few minutes. It needs no setup before.
# The base, demo/rwkv7-reverse.pth, reverses strings of letters. The adapter teaches it to sort them.
# For a run of your own change load_model, data_file and proj_dir. Then look at the other settings once.
# If memory runs out, set micro_bsz=1 first. Then add --grad_cp 2 to the command, then --grad_cp 1.
set -euo pipefail
source "$(dirname "$0")/../scripts/setup.sh" ""

load_model="demo/rwkv7-reverse.pth"     # the base: any RWKV-6 or RWKV-7 .pth; the file has its sizes
proj_dir="out/demo"                     # everything that the run writes goes here
data_file="$proj_dir/sort.jsonl"        # JSONL: {"text": ...} or {"messages": [...]}; made below if absent
heldout_file="$proj_dir/sort-heldout.jsonl"  # questions that are not in data_file; may be absent
tokenizer="auto"                        # auto, world, bytes, utf16, or a file. auto: what the base records
peft="miss"                             # the adapter method
peft_config='{"r": 12}'                 # its options. r is the rank: here width / 8, for real models 64
micro_bsz=0                             # rows in one forward pass. 0: up to 8; give 1 if memory runs out
ctx_len=0                               # tokens in a row, which short documents share. 0: by the data
epoch_count=0                           # passes over the data. 0: as many as make about 600 steps
lr_init="auto"                          # learning rate. auto: by method, rank and widths
strategy="deepspeed_stage_1"            # auto, ddp, deepspeed_stage_1, _2 or _3
devices=1                               # number of GPUs, or of CPU processes
threads=1                               # CPU threads for this tiny model; for a real one delete the export

export OMP_NUM_THREADS="$threads"
mkdir -p "$proj_dir"
[ -f "$data_file" ] || python -m demo.task sort --rows 14000 --out "$data_file" --heldout 500 --heldout_out "$heldout_file"

# a second call finds the finished run and goes on to the merge. Nothing is ever deleted
set -x
python train.py --load_model "$load_model" --data_file "$data_file" --proj_dir "$proj_dir" --tokenizer "$tokenizer" \
    --peft "$peft" --peft_config "$peft_config" --micro_bsz "$micro_bsz" --ctx_len "$ctx_len" --epoch_count "$epoch_count" \
    --lr_init "$lr_init" --strategy "$strategy" --devices "$devices" --resume auto
python -m rwkv_miss merge --base "$load_model" --adapter "$proj_dir/adapter.pth" --out "$proj_dir/merged.pth"
python -m scripts.verify_merge --base "$load_model" --adapter "$proj_dir/adapter.pth" --merged "$proj_dir/merged.pth"
python -m demo.chat --model "$proj_dir/merged.pth" --prompt "sort kitchen" --temperature 0
{ set +x; } 2>/dev/null
[ -f "$heldout_file" ] || exit 0
echo "answering the held-out questions with the base and the merged file"
python -m demo.accuracy --base "$load_model" --merged "$proj_dir/merged.pth" \
    --questions "$heldout_file" --summary "$proj_dir/run.json"
