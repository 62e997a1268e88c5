"""Many clients of a server at once, for minutes: python -m benchmarks.serve_load --seconds 180

A random model with random adapters answers known requests: each was sent alone before, and every answer must
be the same, character by character. Of 100 requests, --forms must follow a JSON schema, --states go on from a
state that the server keeps, and --hangups are left by their client in the middle. Meanwhile another client
sends prompts of --long tokens, and with --states one makes states, goes on from them and deletes them. The
longest pause between two pieces of a stream is measured, and the server's memory is read four times a minute.
The exit code is 1 if an answer differs or is lost, a row stays taken, or memory grows.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator

import torch

import rwkv_miss
from src.model import RWKV

from .common import add_integers, argument_parser, as_flags, report, settings_without, write_random_base

START_SECONDS = 600  # most seconds until a server listens, including the build of its kernels
MOST_GROWTH = 1.03  # largest growth factor of memory, from the first quarter of the time to the end
DISH = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "price": {"type": "integer"}},
    "required": ["name", "price"],
    "additionalProperties": False,
}
WORDS = "the model reads a prompt and writes an answer while others wait for their next token".split()


@dataclasses.dataclass
class StartedServer:
    """A server in a process of its own."""

    address: tuple[str, int]
    model: str
    log: pathlib.Path

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}"

    def metrics(self) -> dict[str, float]:
        import httpx

        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        pairs = (line.split() for line in lines if line.startswith("rwkv_"))
        return {name: float(value) for name, value in pairs}

    def settled(self, seconds: float = 60) -> int:
        """Count the answers that still run or wait after `seconds` seconds without clients."""
        end = time.monotonic() + seconds
        while True:
            metrics = self.metrics()
            left = int(metrics["rwkv_answers_running"] + metrics["rwkv_answers_waiting"])
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.1)

    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def served_model(layers: int, width: int, adapters: int, **flags) -> Iterator[StartedServer]:
    """Return a server of a random model with random MiSS adapters a0, a1, ..., that ends with the context."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_random_base(folder / "model.pth", 7, layers, width, tokenizer="")
        for number in range(adapters):
            write_random_adapter(folder, f"a{number}", number)
        given = [f"--adapter=a{number}={folder}/a{number}.pth" for number in range(adapters)]
        flags = {"model": folder / "model.pth", "port": 0, "seed": 0, **flags}
        command = [sys.executable, "-m", "demo.serve", *as_flags(**flags), *given]
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(command, stderr=log, stdout=log)
        try:
            yield StartedServer(_address(folder / "log", process), "model", folder / "log")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def write_random_adapter(folder: pathlib.Path, name: str, seed: int) -> None:
    model = RWKV.load(folder / "model.pth")
    rwkv_miss.inject(model, "miss", rank=8)
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn_like(p)
    rwkv_miss.save_adapter(model, folder / f"{name}.pth")


def _address(log: pathlib.Path, process: subprocess.Popen) -> tuple[str, int]:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r"http://([\d.]+):(\d+)/v1", log.read_text()):
            return found[1], int(found[2])
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


@dataclasses.dataclass
class Seen:
    """Replies that the clients have seen."""

    answers: int = 0
    different: int = 0
    lost: int = 0
    left: int = 0  # requests that their client left
    states: int = 0  # states made and deleted meanwhile
    tokens: int = 0
    first: list[float] = dataclasses.field(default_factory=list)
    pauses: list[float] = dataclasses.field(default_factory=list)  # longest pause of each answer
    memory: list[float] = dataclasses.field(default_factory=list)


def message(rng: random.Random, role: str = "user") -> dict:
    return {"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randrange(5, 120)))}


def requests_of(server: StartedServer, args) -> list[dict]:
    """Make different requests to the base and the adapters, greedy and drawn, and the states that they
    use."""
    import httpx

    rng, chances = random.Random(1), random.Random(3)
    models = [server.model, *(f"a{number}" for number in range(args.adapters))]
    states = {}
    bodies = []
    for number in range(args.requests):
        body = {
            "model": models[number % len(models)],
            "messages": [message(rng)],
            "max_tokens": rng.randrange(args.tokens // 2, args.tokens + 1),
            "temperature": number % 2,
            "top_p": 0.9,
            "seed": number,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if chances.randrange(100) < args.forms:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "dish", "schema": DISH}}
        if chances.randrange(100) < args.states:
            if body["model"] not in states:
                begun = {"model": body["model"], "messages": [message(rng), message(rng, "assistant")]}
                made = httpx.post(f"{server.url}/v1/states", json=begun, timeout=600).raise_for_status()
                states[body["model"]] = made.json()["id"]
            body["state_id"] = states[body["model"]]
        bodies.append(body)
    return bodies


async def asked(client, body: dict) -> AsyncIterator[tuple[float, str, int]]:
    """Yield (seconds since the last piece, new text, tokens or 0) of a stream."""
    before = time.monotonic()
    async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise OSError(event["error"]["message"])
            tokens = (event.get("usage") or {}).get("completion_tokens", 0)
            delta = event["choices"][0]["delta"] if event["choices"] else {}
            text = delta.get("content") or delta.get("reasoning_content") or ""
            if text or tokens:
                now = time.monotonic()
                yield now - before, text, tokens
                before = now


async def one_client(
    client, bodies: list[dict], alone: list[str], end: float, seen: Seen, seed: int, hangups: int
) -> None:
    """Ask again and again until the end."""
    rng = random.Random(seed)
    while time.monotonic() < end:
        number = rng.randrange(len(bodies))
        text, waits, tokens = "", [], 0
        leaves = rng.randrange(100) < hangups
        last = rng.randrange(20) if leaves else -1  # number of the piece after which the client leaves
        try:
            async with contextlib.aclosing(asked(client, bodies[number])) as pieces:
                async for wait, new, counted in pieces:
                    waits.append(wait)
                    text, tokens = text + new, tokens + counted
                    if len(waits) == last:
                        break
        except OSError:
            seen.lost += 1
            continue
        if len(waits) == last:
            seen.left += 1
            continue
        seen.answers += 1
        seen.different += text != alone[number]
        seen.tokens += tokens
        seen.first.append(waits[0])
        seen.pauses.append(max(waits[1:], default=0.0))


async def long_prompts(client, tokens: int, every: float, end: float) -> None:
    """Send a prompt that takes long to read, now and then."""
    rng = random.Random(2)
    while time.monotonic() < end:
        body = {"prompt": [rng.randrange(1, 60_000) for _ in range(tokens)], "max_tokens": 1}
        (await client.post("/v1/completions", json=body)).raise_for_status()
        await asyncio.sleep(every)


async def passing_states(client, every: float, end: float, seen: Seen) -> None:
    """Make a state, go on from it and delete it, again and again."""
    rng = random.Random(4)
    while time.monotonic() < end:
        made = (await client.post("/v1/states", json={"messages": [message(rng)]})).raise_for_status().json()
        body = {"prompt": "Then", "state_id": made["id"], "max_tokens": 2}
        (await client.post("/v1/completions", json=body)).raise_for_status()
        (await client.delete(f"/v1/states/{made['id']}")).raise_for_status()
        seen.states += 1
        await asyncio.sleep(every)


async def load(server: StartedServer, args, bodies: list[dict]) -> Seen:
    import httpx

    seen, alone = Seen(), []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        for body in bodies:
            alone.append("".join([text async for _, text, _ in asked(client, body)]))
        print(f"{len(bodies)} requests were asked alone", flush=True)
        end = time.monotonic() + args.seconds
        tasks = [
            asyncio.create_task(one_client(client, bodies, alone, end, seen, seed, args.hangups))
            for seed in range(args.clients)
        ]
        if args.long:
            tasks.append(asyncio.create_task(long_prompts(client, args.long, 5, end)))
        if args.states:
            tasks.append(asyncio.create_task(passing_states(client, 1, end, seen)))
        while time.monotonic() < end:
            await asyncio.sleep(min(15, args.seconds / 8))
            metrics = await asyncio.to_thread(server.metrics)
            seen.memory.append(metrics["rwkv_resident_memory_bytes"])
            print(f"{seen.answers} answers, {seen.memory[-1] / 2**20:.0f} MiB", flush=True)
        await asyncio.gather(*tasks)
    return seen


def main() -> None:
    parser = argument_parser(__doc__)
    add_integers(parser, seconds=180, clients=64, adapters=4, rows=16, long=8192, requests=40, tokens=48)
    add_integers(parser, layers=6, width=256, forms=0, states=0, hangups=0)
    args = parser.parse_args()
    flags = {"rows": args.rows, "cache": "32MB"}
    with served_model(args.layers, args.width, args.adapters, **flags) as server:
        bodies = requests_of(server, args)
        seen = asyncio.run(load(server, args, bodies))
        left, printed = server.settled(), server.printed()
    quarter = seen.memory[len(seen.memory) // 4]
    growth = seen.memory[-1] / quarter
    report(
        "serve_load",
        **settings_without(args),
        answers=seen.answers,
        different=seen.different,
        lost=seen.lost,
        left_by_clients=seen.left,
        states_made=seen.states,
        rows_taken_at_the_end=left,
        tokens_per_second=round(seen.tokens / args.seconds, 1),
        first_token_seconds=[round(statistics.median(seen.first), 3), round(max(seen.first), 3)],
        longest_pause_seconds=round(max(seen.pauses), 3),
        median_longest_pause_seconds=round(statistics.median(seen.pauses), 3),
        memory_mib=[round(size / 2**20) for size in seen.memory],
        memory_growth=round(growth, 4),
    )
    if seen.different or seen.lost or left or growth > MOST_GROWTH or "Traceback" in printed:
        sys.exit(printed[-4000:])


if __name__ == "__main__":
    main()
