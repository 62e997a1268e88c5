"""A whole training from top to bottom: base, MiSS, documents, batches, steps, adapter, merge, one answer.

python -m demo.task sort --rows 5000 --out out/sort.jsonl --heldout 200 --heldout_out out/held.jsonl
python -m demo.loop --load_model demo/rwkv7-reverse.pth --data_file out/sort.jsonl \\
    --eval_file out/held.jsonl --proj_dir out/loop --prompt "sort kitchen"

Copy this file to try an idea. Its losses equal train.py's with the same flags. train.py adds other losses,
several GPUs, resume, quantised bases, long rows in chunks, and reports.
"""

from __future__ import annotations

import math
import os

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m demo.loop")

from src.common.startup import importing

with importing():
    import numpy as np
    import torch

    import rwkv_miss
    from rwkv_miss.errors import one_line_errors
    from rwkv_miss.flags import flag, options, parse_flags
    from rwkv_miss.progress import progress, say
    from src import ops
    from src.common.batch import Batch
    from src.data.batches import pack
    from src.data.collate import collate
    from src.data.dataset import Documents, load
    from src.data.encode import Encoder
    from src.data.recorded_tokenizer import recorded_tokenizer
    from src.inference.conversation import Conversation
    from src.inference.decoders import fastest
    from src.inference.engine import Engine
    from src.inference.sampling import GREEDY
    from src.model import RWKV


@options
class Flags:
    load_model: str = flag(help="base model, a .pth of RWKV-6 or RWKV-7")
    data_file: str = flag(help='rows to train on: {"text": ...} or {"messages": [...]}')
    eval_file: str = flag(help="rows for the validation loss")
    proj_dir: str = flag(help="folder for adapter.pth and merged.pth")
    prompt: str = flag(help="prompt for the merged model at the end")
    rank: int = flag(12, "rank of MiSS; default %(default)s, for real models 64", low=1)
    ctx_len: int = flag(128, "tokens of a row; default %(default)s", low=1)
    micro_bsz: int = flag(16, "rows of a step; default %(default)s", low=1)
    epoch_steps: int = flag(300, "steps in all; default %(default)s", low=1)
    eval_steps: int = flag(100, "steps between validations; default %(default)s", low=1)
    lr_init: float = flag(5e-3, "the highest learning rate; default %(default)s")
    random_seed: int = flag(42, "default %(default)s")


def train(args: Flags) -> list[float]:
    """Train, print, save, merge and ask. Return the loss of every step."""
    # The device. Weights are bf16 on a GPU; MiSS's trained numbers are fp32 everywhere.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kernel, _ = ops.choose("auto", device.type)  # WKV kernel: native if it can be built, else torch

    # The base, with MiSS on every linear of its layers. The whole base is frozen.
    torch.manual_seed(args.random_seed)
    model = RWKV.load(args.load_model, dtype, device, kernel)
    print(rwkv_miss.inject(model, "miss", rank=args.rank).line())
    trained = [p for p in model.parameters() if p.requires_grad]

    # Documents. Each has token ids, and for every id a weight in the loss: 0 in a prompt, 1 in an answer.
    tokenizer = recorded_tokenizer("auto", "", model.arch.vocab_size, args.load_model)
    documents = load(args.data_file, Encoder(tokenizer)).documents(args.ctx_len)
    held_out = load(args.eval_file, Encoder(tokenizer)).documents(args.ctx_len)

    # Rows of at most ctx_len inputs, which short documents share. A document's last token is no input.
    rows = pack(documents.lengths - 1, args.ctx_len, args.random_seed)
    lengths = rows.sums(documents.lengths - 1)
    optimizer = torch.optim.AdamW(trained, lr=args.lr_init, betas=(0.9, 0.99), weight_decay=0.0)
    losses = []
    for step in progress(range(args.epoch_steps), "training", unit="steps"):
        if step % args.eval_steps == 0:
            say(f"step {step}: validation loss {validation_loss(model, held_out, args):.4f}")

        # The batch, sorted by length. Each pass over the data takes the rows in another order.
        turn, place = divmod(step, math.ceil(len(rows) / args.micro_bsz))
        order = np.random.default_rng([args.random_seed, turn]).permutation(len(rows))
        chosen = order[place * args.micro_bsz : (place + 1) * args.micro_bsz]
        chosen = sorted(chosen, key=lambda row: (lengths[row], row))
        batch = batch_of(documents, [rows[row] for row in chosen], device)

        # The loss: the mean over the trained tokens. Its gradient is clipped to a norm of 1.
        loss = summed_loss(model, batch) / batch.step_weight
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = args.lr_init * rate_factor(step, args.epoch_steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"step {args.epoch_steps}: validation loss {validation_loss(model, held_out, args):.4f}")

    # The adapter file holds the trained numbers. The merged file has the base's keys, shapes and dtypes.
    os.makedirs(args.proj_dir, exist_ok=True)
    adapter, merged = f"{args.proj_dir}/adapter.pth", f"{args.proj_dir}/merged.pth"
    rwkv_miss.save_adapter(model, adapter, step=args.epoch_steps, tokenizer=tokenizer.name)
    rwkv_miss.merge_file(args.load_model, adapter, merged)

    # One answer of the merged model.
    decoder, _ = fastest(RWKV.load(merged, dtype, device, kernel).eval())
    conversation = Conversation(Engine(decoder, tokenizer), GREEDY)
    print(args.prompt, "->", "".join(conversation.answer(args.prompt, max_tokens=64)).strip())
    return losses


def batch_of(documents: Documents, rows: list[list[int]], device: torch.device) -> Batch:
    """Return the tensors of these rows, each a list of document numbers; step_weight: the sum of weights."""
    of_rows = [[documents[i] for i in row] for row in rows]
    weight = math.fsum(document.weight for row in of_rows for document in row)
    return collate(of_rows, weight).to(device)


def summed_loss(model: RWKV, batch: Batch) -> torch.Tensor:
    """Return the weighted sum of cross entropies. `where` are the places whose next token is trained."""
    features, _ = model.features(batch.ids, None, batch.reset, batch.where)
    return model.loss(features, batch.targets, batch.weights)


@torch.no_grad()
def validation_loss(model: RWKV, documents: Documents, args: Flags) -> float:
    """Return the mean loss over all trained tokens of the documents."""
    rows = list(pack(documents.lengths - 1, args.ctx_len, args.random_seed))
    parts = [rows[at : at + args.micro_bsz] for at in range(0, len(rows), args.micro_bsz)]
    batches = (batch_of(documents, part, model.emb.weight.device) for part in parts)
    return sum(summed_loss(model, batch).item() for batch in batches) / documents.weight


def rate_factor(step: int, steps: int) -> float:
    """Return the share of the rate: a linear warm-up for 5 % of the steps, then a cosine to a tenth."""
    warmup = int(0.05 * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * ((step - warmup) / max(steps - 1 - warmup, 1))))


if __name__ == "__main__":
    with one_line_errors():
        train(parse_flags(Flags, None, prog="python -m demo.loop", description=__doc__.partition("\n")[0]))
