#!/usr/bin/env bash
# Chat with a merged file, or with a base and its unmerged adapter.
# Ctrl-D ends the chat; /help lists its commands.
set -euo pipefail
source "$(dirname "$0")/../scripts/setup.sh" ""

model="out/demo/merged.pth"     # a merged file or a base
adapter=""                      # an adapter of that base. Empty: none
temperature=1.0                 # lower is more predictable. 0 is greedy
top_p=0.7                       # sample from the likeliest tokens only, up to this total probability

set -x
python -m demo.chat --model "$model" ${adapter:+--adapter "$adapter"} --temperature "$temperature" --top_p "$top_p" "$@"
