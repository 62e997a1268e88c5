"""A server of this process on a free port of 127.0.0.1, and a decoder that says what it is told."""

import contextlib
import threading
import time
import types

import torch

from src.data.rwkv_template import RwkvTemplate
from src.data.tokenizer import load_tokenizer
from src.inference.engine import Engine
from src.serving.app import assemble
from src.serving.guard import Guard
from src.serving.limits import Limits
from src.serving.listener import bound
from src.serving.request_parsing import Defaults
from src.serving.served_models import Records, ServedModels
from src.serving.uvicorn_server import Server

LOCAL = Guard((), frozenset({"127.0.0.1", "localhost"}))


class Scripted:
    """Stands in for a decoder: to a prompt, every row says `script`, one byte after another, and then the end
    of document. `prompts` are the texts that were read. A step takes `pause` seconds.
    """

    def __init__(self, rows=4, script="Hello.", pause=0.0):
        self.rows, self.script, self.pause, self.prompts = rows, script, pause, []
        self.model = types.SimpleNamespace(kernel="torch", arch=types.SimpleNamespace(vocab_size=256))
        self.adapters = None
        self.states = [None] * rows

    def _logits(self, state):
        said, place = state
        logits = torch.zeros(1, 256)
        logits[0, said[place] if place < len(said) else 0] = 9
        return logits

    def read(self, ids, state, applied=None, each=None):
        text = bytes(ids[0].tolist()).decode(errors="replace")  # a chunk may cut a character
        self.prompts.append((state[2] if state else "") + text)
        if each:
            each(torch.zeros(ids.shape[1] - 1, 256))
        said = self.script.encode()
        return self._logits((said, 0)), (said, 0, self.prompts[-1])

    def state_after(self, ids, state, applied=None, each=None):
        if each:
            each(torch.zeros(1, 256))
        return self.read(ids, state, applied, each)[1]

    def put(self, row, state):
        self.states[row] = state[:2]

    def move(self, source, target):
        self.states[target] = self.states[source]

    def step(self, tokens, applied):
        time.sleep(self.pause)
        rows = range(len(tokens))
        for row in rows:
            said, place = self.states[row]
            self.states[row] = said, place + 1
        return torch.cat([self._logits(self.states[row]) for row in rows])

    def refresh(self):
        pass


def no_adapters():
    """Stands in for adapters.Adapters."""
    model = types.SimpleNamespace(base_name="tiny.pth", base_fingerprint="blake2b:0")
    identity = {"adapters": [], "scale": 1.0}
    return types.SimpleNamespace(
        model=model, by_name={}, used=(), check=lambda applied: None, identity=lambda: identity
    )


def records(tokenizer, template=None, bos=()):
    chosen = template or RwkvTemplate("rwkv", "json")
    return Records(lambda paths: chosen, lambda paths: bos, tokenizer.name)


def scripted(script="Hello.", template=None, rows=4, pause=0.0, **options):
    """running() with a Scripted decoder."""
    tokenizer = load_tokenizer("bytes", 256)
    decoder = Scripted(rows, script, pause)
    engine = Engine(decoder, tokenizer, chunk=64, reads_first=False)
    served = ServedModels("tiny", no_adapters(), records(tokenizer, template), 1.0, None)
    return running(engine, served, **options)


@contextlib.contextmanager
def running(engine, served, limits=None, defaults=None, guard=LOCAL, log_requests=False, tls=()):
    """A server in a thread: .url, .dispatcher, .engine, .stop().

    At the end no row is taken and nobody waits.
    """
    limits = limits or Limits(finishing=5)
    defaults = defaults or Defaults(64, "", {"temperature": 0.0}, 0)
    app, dispatcher = assemble(engine, served, defaults, limits, guard, log_requests)
    ready, listener = threading.Event(), bound("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = Server(app, dispatcher, listener, ready.set, *tls)
    thread = threading.Thread(target=server.run, daemon=True)
    dispatcher.worker.start()
    thread.start()
    assert ready.wait(20), "the server did not start"

    def stop():
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server does not end"

    found = types.SimpleNamespace(
        url=f"http{'s' if tls else ''}://127.0.0.1:{port}",
        port=port,
        dispatcher=dispatcher,
        engine=engine,
        server=server,
        thread=thread,
        stop=stop,
    )
    try:
        yield found
    finally:
        stop()
        dispatcher.worker.close()
    assert (dispatcher.open, dispatcher.running, dispatcher.worker.followed, engine.idle) == (
        0,
        set(),
        {},
        True,
    )
