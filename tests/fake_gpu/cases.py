"""What is run on the fake GPU, by name; importing this imports no torch."""

import fnmatch

METHODS = (
    "adalora",
    "bat",
    "dora",
    "lora",
    "lora_fa",
    "miss",
    "mora",
    "mos",
    "none",
    "pissa",
    "prolora",
    "state",
    "vera",
)
VERSIONS = (6, 7)
LAYERS = ("miss", "none")  # whose layers are counted by kind
# method, quantised base, --grad_cp
MEMORY = (("miss", "none", 0), ("miss", "nf4", 1), ("lora", "none", 2), ("none", "none", 0))
READING = ("decode", "chat", "evaluation", "likelihood")
# train.py as a whole; the first one evaluates and answers, too
RUNS = {
    "bf16": "--precision bf16 --eval_samples 1",
    "fp16": "--precision fp16 --eval_split 0",
    "nf4": "--quant nf4 --eval_split 0",
    "chunked": "--chunk_ctx 64 --ctx_len 128 --eval_split 0",
    "state": "--peft state --eval_split 0",
    "none": "--peft none --eval_split 0",
}

STEP_CASES = [f"step {method} v{version}" for method in METHODS for version in VERSIONS]
WEIGHTED_CASES = [f"step with weights miss v{version}" for version in VERSIONS]
LAYER_CASES = [f"layer {peft} v{version}" for peft in LAYERS for version in VERSIONS]
MEMORY_CASES = [
    f"memory {peft} {quant} grad_cp {level} v{version}"
    for peft, quant, level in MEMORY
    for version in VERSIONS
]
READING_CASES = [f"{what} v{version}" for what in READING for version in VERSIONS]
RUN_CASES = [f"train.py {name}" for name in RUNS]
SEARCH_CASES = ["train.py with a search of the rate"]
ALL = STEP_CASES + WEIGHTED_CASES + LAYER_CASES + MEMORY_CASES + READING_CASES + RUN_CASES + SEARCH_CASES


def matching(patterns: list[str]) -> list[str]:
    """The cases that a pattern such as "step miss v?" fits, or that have it in their name."""
    return [
        case
        for case in ALL
        if any(fnmatch.fnmatchcase(case, pattern) or pattern in case for pattern in patterns)
    ]
