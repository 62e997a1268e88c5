"""Cases that run on the fake GPU, by name; importing this imports no torch."""

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
# version, method, quantised base, --grad_cp, --chunk_ctx
MEMORY = (
    *((version, "miss", "none", 0, 0) for version in VERSIONS),
    *((version, "miss", "nf4", 1, 0) for version in VERSIONS),
    *((version, "lora", "none", 2, 0) for version in VERSIONS),
    *((version, "none", "none", 0, 0) for version in VERSIONS),
    (6, "miss", "int8", 2, 0),
    (7, "dora", "none", 0, 0),
    (7, "state", "none", 1, 0),
    (7, "miss", "none", 0, 128),
)
STAGES = (1, 2, 3)  # stages of ZeRO, on RWKV-7
QUANTS = ("int8", "nf4")  # formats of the base in a chat on RWKV-7
MERGED = ("miss", "dora")  # on RWKV-7
BESIDE = ("miss", "dora")  # in a chat on RWKV-7: one stays an adapter, one is merged in memory
READING = ("decode", "decode 8 rows with adapters", "chat", "evaluation", "likelihood")
# train.py as a whole; the first one evaluates and answers, too
RUNS = {
    "bf16": "--precision bf16 --eval_samples 1 --eval_split 0.1",
    "fp16": "--precision fp16 --eval_split 0",
    "nf4": "--quant nf4 --eval_split 0",
    "chunked": "--chunk_ctx 64 --ctx_len 128 --eval_split 0",
    "state": "--peft state --eval_split 0",
    "none": "--peft none --eval_split 0",
    "grpo": "--precision bf16 --eval_split 0 --loss grpo --beta 0.1 --inner_steps 2 --max_tokens 3",
}

STEP_CASES = [f"step {method} v{version}" for method in METHODS for version in VERSIONS]
WEIGHTED_CASES = [f"step with weights miss v{version}" for version in VERSIONS]
LAYER_CASES = [f"layer {peft} v{version}" for peft in LAYERS for version in VERSIONS]
MEMORY_CASES = [
    f"memory {peft} {quant} grad_cp {level} chunk_ctx {chunk} v{version}"
    for version, peft, quant, level, chunk in MEMORY
]
READING_CASES = [f"{what} v{version}" for what in READING for version in VERSIONS]
PROGRAM_CASES = [
    *(f"chat on {quant}" for quant in QUANTS),
    *(f"decode with {peft}" for peft in BESIDE),
    "lm_eval",
    *(f"merge of {peft}" for peft in MERGED),
    "gpu_budget",
]
RUN_CASES = [f"train.py {name}" for name in RUNS]
SEVERAL_CASES = ["two GPUs: ddp", *(f"two GPUs: ZeRO {stage}" for stage in STAGES)]
ZERO_MEMORY_CASES = [f"memory two GPUs: none ZeRO {stage}" for stage in STAGES]
ALL = (
    STEP_CASES
    + WEIGHTED_CASES
    + LAYER_CASES
    + MEMORY_CASES
    + READING_CASES
    + PROGRAM_CASES
    + RUN_CASES
    + SEVERAL_CASES
    + ZERO_MEMORY_CASES
)


def matching(patterns: list[str]) -> list[str]:
    """The cases that a pattern such as "step miss v?" fits, or that have it in their name."""
    return [
        case
        for case in ALL
        if any(fnmatch.fnmatchcase(case, pattern) or pattern in case for pattern in patterns)
    ]
