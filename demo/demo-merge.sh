#!/usr/bin/env bash
# Merge an adapter into its base. The result is a plain .pth for any RWKV runtime.
set -euo pipefail
source "$(dirname "$0")/../scripts/setup.sh" ""

base="demo/rwkv7-reverse.pth"       # the file that the adapter was trained on. Another one is refused
adapter="out/demo/adapter.pth"      # what train.py wrote
out="out/demo/merged.pth"           # the merged file
dtype="base"                        # as the base. fp16 or fp32 if rounding lost too much. auto decides

set -x
python -m rwkv_miss merge --base "$base" --adapter "$adapter" --out "$out" --dtype "$dtype"
