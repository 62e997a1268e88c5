"""A whole GRPO training from top to bottom: questions, rollouts, rewards, advantages, loss, steps, one check.

python -m demo.task reverse --letters 10 --rows 2000 --out out/asked.jsonl --heldout 100 \\
    --heldout_out out/held.jsonl
python -m demo.rl_loop --load_model demo/rwkv7-reverse.pth --data_file out/asked.jsonl \\
    --eval_file out/held.jsonl --proj_dir out/rl_loop

38 of the 100 held-out answers are right before, 99 after, in 26 s of CPU time (one seed, AMD EPYC, fp32).
Copy this file to try an idea, and demo/loop.py for training on given answers. Its rewards and losses equal
those of train.py --loss grpo with the same flags. train.py adds several steps on one set of rollouts, a KL,
other rewards and their time limits, several GPUs, resume, and reports.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m demo.rl_loop")

from src.common.startup import importing

with importing():
    import numpy as np
    import torch

    import rwkv_miss
    from rwkv_miss.errors import UserError, one_line_errors
    from rwkv_miss.flags import flag, options, parse_flags
    from rwkv_miss.progress import progress, say
    from src import ops
    from src.common.batch import Batch
    from src.data.answer_batches import GROUP, collate_answers
    from src.data.answer_example import AnswerGroup
    from src.data.encode import Encoder
    from src.data.questions import Question, QuestionReader, Questions
    from src.data.recorded_tokenizer import recorded_tokenizer
    from src.data.templates import answer_text
    from src.inference.decoders import for_training
    from src.inference.engine import Engine
    from src.inference.request import Answer, Request
    from src.inference.sampling import GREEDY, Sampling
    from src.model import RWKV
    from src.model.batch_loss import Chunks

    from .loop import rate_factor


@options
class Flags:
    load_model: str = flag(help="base model, a .pth of RWKV-6 or RWKV-7")
    data_file: str = flag(help="questions with their right answers")
    eval_file: str = flag(help="questions that judge the training")
    proj_dir: str = flag(help="folder for adapter.pth and merged.pth")
    rank: int = flag(12, "rank of MiSS; default %(default)s, for real models 64", low=1)
    ctx_len: int = flag(128, "tokens of a question and an answer; default %(default)s", low=1)
    max_tokens: int = flag(24, "longest answer; default %(default)s", low=1)
    micro_bsz: int = flag(4, "questions of a step; default %(default)s", low=1)
    group_size: int = flag(8, "answers to each; default %(default)s")
    epoch_steps: int = flag(100, "steps in all; default %(default)s", low=1)
    eval_steps: int = flag(50, "steps between checks; default %(default)s", low=1)
    lr_init: float = flag(1e-3, "the highest learning rate; default %(default)s")
    random_seed: int = flag(42, "default %(default)s")


def train(args: Flags) -> list[tuple[float, float]]:
    """Train, print, save and merge. Return (mean reward, loss) of every step."""
    if args.group_size < 2:
        raise UserError(f"--group_size {args.group_size}: an answer is compared with others; give 2 or more")

    # The device. Weights are bf16 on a GPU; MiSS's trained numbers are fp32 everywhere.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kernel, _ = ops.choose("auto", device.type)  # WKV kernel: native if it can be built, else torch

    # The base, with MiSS on every linear of its layers. The whole base is frozen.
    torch.manual_seed(args.random_seed)
    model = RWKV.load(args.load_model, dtype, device, kernel)
    print(rwkv_miss.inject(model, "miss", rank=args.rank).line())
    trained = [p for p in model.parameters() if p.requires_grad]

    # Questions. Each has the tokens of its prompt, and its right answer.
    tokenizer = recorded_tokenizer("auto", "", model.arch.vocab_size, args.load_model)
    encoder, sizes = Encoder(tokenizer), (args.ctx_len, args.group_size, args.max_tokens)
    questions = QuestionReader(encoder).load(args.data_file).examples(*sizes)
    held_out = QuestionReader(encoder).load(args.eval_file).examples(*sizes)

    optimizer = torch.optim.AdamW(trained, lr=args.lr_init, betas=(0.9, 0.99), weight_decay=0.0)
    steps = []
    for step in progress(range(args.epoch_steps), "training", unit="steps"):
        if step % args.eval_steps == 0:
            say(f"step {step}: reward of greedy answers {greedy_reward(model, held_out, encoder):.4f}")

        # The questions of this step. Each pass over the data takes the questions in another order.
        turn, place = divmod(step, math.ceil(len(questions) / args.micro_bsz))
        order = np.random.default_rng([args.random_seed, turn]).permutation(len(questions))
        asked = order[place * args.micro_bsz : (place + 1) * args.micro_bsz].tolist()

        # Rollouts: the current model draws a group of answers to each question.
        requests = [rollout(questions, i, step, encoder, args) for i in asked]
        groups = answered(model, encoder, requests)

        # Rewards (P, G), and advantages: how much better an answer is than its group.
        given = [[reward(questions[i], a, encoder) for a in group] for i, group in zip(asked, groups)]
        rewards = torch.tensor(given, dtype=torch.float64)
        apart = rewards - rewards.mean(1, keepdim=True)
        advantages = apart / (rewards.std(1, keepdim=True) + 1e-4)

        # The loss: the mean over the tokens of all answers. Groups of equal rewards teach nothing.
        examples = [
            AnswerGroup.of(questions.prompts[i], [a.tokens for a in group], row.tolist(), log_probs_of(group))
            for i, group, row in zip(asked, groups, advantages)
            if row.abs().max() > 1e-9
        ]
        tokens = sum(len(answer.tokens) for group in groups for answer in group)
        batch = collate_answers([[one] for one in examples], tokens, shared=True, columns=GROUP).to(device)
        loss = summed_loss(model, batch) / batch.step_weight
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = args.lr_init * rate_factor(step, args.epoch_steps)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((rewards.mean().item(), loss.item()))
    reached = greedy_reward(model, held_out, encoder)
    print(f"step {args.epoch_steps}: reward of greedy answers {reached:.4f}")

    # The adapter file holds the trained numbers. The merged file has the base's keys, shapes and dtypes.
    os.makedirs(args.proj_dir, exist_ok=True)
    adapter, merged = f"{args.proj_dir}/adapter.pth", f"{args.proj_dir}/merged.pth"
    rwkv_miss.save_adapter(model, adapter, step=args.epoch_steps, tokenizer=tokenizer.name)
    rwkv_miss.merge_file(args.load_model, adapter, merged)
    return steps


def rollout(questions: Questions, place: int, step: int, encoder: Encoder, args: Flags) -> Request:
    """Request answers at temperature 1, so that ln p equals the training's; each has a seed."""
    seed = np.random.SeedSequence([args.random_seed, step, place]).generate_state(1, np.uint64)
    return Request(
        questions.prompts[place].tolist(),
        args.max_tokens,
        Sampling(temperature=1.0, top_p=1.0),
        seed=int(seed[0]),
        stops=encoder.template.stops,
        n=args.group_size,
        logprobs=0,  # only the drawn tokens' ln p, no alternatives
    )


@torch.no_grad()
def answered(model: RWKV, encoder: Encoder, requests: Sequence[Request]) -> list[Sequence[Answer]]:
    """Return the answers to each request, all drawn in one batch of an engine."""
    with contextlib.closing(for_training(model, sum(request.n for request in requests))) as decoder:
        engine = Engine(decoder, encoder.tokenizer)
        groups = [engine.submit(request) for request in requests]
        while not engine.idle:
            engine.step()
    return groups


def reward(question: Question, answer: Answer, encoder: Encoder) -> float:
    """Reward an answer that ended by itself and equals the right one, word for word."""
    said = answer_text(answer.text, encoder.template, question.opening)
    return float(not answer.cut and said == question.answer)


def log_probs_of(group: Sequence[Answer]) -> list[np.ndarray]:
    """Return ln p of each answer's tokens when they were drawn, (t,) fp32."""
    return [np.array([token.logprob for token in answer.logprobs], np.float32) for answer in group]


def summed_loss(model: RWKV, batch: Batch) -> torch.Tensor:
    """Sum -w r A over tokens. r is p divided by p before this step, so 1, and nothing is clipped. w corrects
    for tokens that the engine drew with another p than the training's."""
    log_probs = Chunks().log_probs(model, batch).double()
    weight = (log_probs.detach() - batch.drawn.double()).exp().clamp(max=2.0)
    ratio = (log_probs - log_probs.detach()).exp()
    return -(weight * ratio * batch.advantage.double()[batch.answer]).sum()


def greedy_reward(model: RWKV, questions: Questions, encoder: Encoder) -> float:
    """Return the mean reward of greedy answers."""
    stops, limit = encoder.template.stops, questions.max_tokens
    requests = [Request(p.tolist(), limit, GREEDY, stops=stops) for p in questions.prompts]
    groups = answered(model, encoder, requests)
    return sum(reward(q, group[0], encoder) for q, group in zip(questions.questions, groups)) / len(groups)


if __name__ == "__main__":
    with one_line_errors():
        train(parse_flags(Flags, None, prog="python -m demo.rl_loop", description=__doc__.partition("\n")[0]))
