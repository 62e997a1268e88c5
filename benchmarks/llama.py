"""Read the GGUF files that scripts.export writes with llama.cpp itself, an independent program.

The package xllamacpp has llama.cpp in one library, with kernels up to AVX2. A folder with the libraries of a
build can be used as well, such as that of the npm package @node-llama-cpp/linux-x64, which has one library
for each kind of CPU.

llama.cpp is called through its C interface, without a compiler or its headers. The structures that its
functions take and return by value are opaque here, blocks larger than any of them: on x86-64 and ARM-64 a
function that expects less than it is given reads the beginning. Only the first four fields of the context's
parameters are set, and afterwards llama.cpp is asked whether it has used them. A batch of several sequences
is the one structure that is built here (Batch); tests compare its logits with those of each sequence alone.
"""

from __future__ import annotations

import ctypes
import importlib.util
import pathlib

import torch
from torch import Tensor

# libraries of a folder, in the order in which they need each other
LIBRARIES = ("libggml-base.so", "libggml.v*.so", "libllama.v*.so")

Quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
silent = Quiet(lambda level, text, data: None)  # kept alive, because llama.cpp calls it


class Opaque(ctypes.Structure):
    _fields_ = [("words", ctypes.c_uint64 * 64)]


class Batch(ctypes.Structure):
    """llama_batch: each token's id, place and sequences, and whether its logits are wanted."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    ]


class Message(ctypes.Structure):
    _fields_ = [("role", ctypes.c_char_p), ("content", ctypes.c_char_p)]


SIGNATURES = {
    "llama_log_set": (None, Quiet, ctypes.c_void_p),
    "llama_model_default_params": (Opaque,),
    "llama_context_default_params": (Opaque,),
    "llama_model_load_from_file": (ctypes.c_void_p, ctypes.c_char_p, Opaque),
    "llama_model_free": (None, ctypes.c_void_p),
    "llama_init_from_model": (ctypes.c_void_p, ctypes.c_void_p, Opaque),
    "llama_free": (None, ctypes.c_void_p),
    "llama_n_ctx": (ctypes.c_uint32, ctypes.c_void_p),
    "llama_n_batch": (ctypes.c_uint32, ctypes.c_void_p),
    "llama_n_ubatch": (ctypes.c_uint32, ctypes.c_void_p),
    "llama_n_seq_max": (ctypes.c_uint32, ctypes.c_void_p),
    "llama_set_n_threads": (None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32),
    "llama_get_memory": (ctypes.c_void_p, ctypes.c_void_p),
    "llama_memory_clear": (None, ctypes.c_void_p, ctypes.c_bool),
    "llama_batch_get_one": (Opaque, ctypes.c_void_p, ctypes.c_int32),
    "llama_decode": (ctypes.c_int32, ctypes.c_void_p, Opaque),
    "llama_get_logits": (ctypes.c_void_p, ctypes.c_void_p),
    "llama_get_logits_ith": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32),
    "llama_model_get_vocab": (ctypes.c_void_p, ctypes.c_void_p),
    "llama_vocab_n_tokens": (ctypes.c_int32, ctypes.c_void_p),
    "llama_vocab_is_eog": (ctypes.c_bool, ctypes.c_void_p, ctypes.c_int32),
    "llama_tokenize": (
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_bool,
        ctypes.c_bool,
    ),
    "llama_detokenize": (
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_char_p,
        ctypes.c_int32,
        ctypes.c_bool,
        ctypes.c_bool,
    ),
    "llama_model_chat_template": (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_char_p),
    "llama_chat_apply_template": (
        ctypes.c_int32,
        ctypes.c_char_p,
        ctypes.POINTER(Message),
        ctypes.c_size_t,
        ctypes.c_bool,
        ctypes.c_char_p,
        ctypes.c_int32,
    ),
}


def load_library(folder=None) -> ctypes.CDLL:
    """Load llama.cpp's functions from xllamacpp, or from a folder, with its best kernels for this CPU.

    Raises FileNotFoundError if a library is absent.
    """
    if folder is None:
        package = importlib.util.find_spec("xllamacpp")
        if package is None:
            raise FileNotFoundError("the package xllamacpp is absent: pip install xllamacpp")
        library = ctypes.CDLL(str(next(pathlib.Path(package.origin).parent.glob("xllamacpp*.so"))))
    else:
        for pattern in LIBRARIES:
            found = sorted(pathlib.Path(folder).glob(pattern))
            if not found:
                raise FileNotFoundError(f"{folder} has no {pattern}; give a folder of llama.cpp's libraries")
            library = ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)
        # the last library also finds the functions of the libraries that it needs
        library.ggml_backend_load_all_from_path(str(folder).encode())
    for name, (returned, *taken) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = returned, taken
    library.llama_log_set(silent, None)
    return library


class Llama:
    """Loaded GGUF file, with room for `sequences` sequences of tokens / sequences each, a multiple of 256.

    Raises RuntimeError if llama.cpp refuses the file.
    """

    def __init__(self, library: ctypes.CDLL, path, tokens: int = 4096, sequences: int = 1):
        self.library = library
        self.model = library.llama_model_load_from_file(
            str(path).encode(), library.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        parameters = library.llama_context_default_params()
        wanted = {"ctx": tokens, "batch": tokens, "ubatch": tokens, "seq_max": sequences}
        ctypes.memmove(parameters.words, (ctypes.c_uint32 * 4)(*wanted.values()), 16)
        self.context = library.llama_init_from_model(self.model, parameters)
        took = self.context and {name: getattr(library, f"llama_n_{name}")(self.context) for name in wanted}
        if took != wanted:
            raise RuntimeError(
                f"llama.cpp has sizes {took}, expected {wanted}: is its structure another one?"
            )
        self.vocab = library.llama_model_get_vocab(self.model)
        self.vocab_size = library.llama_vocab_n_tokens(self.vocab)
        self.start(1)

    def close(self) -> None:
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)

    def start(self, threads: int) -> None:
        """Forget all tokens."""
        self.library.llama_set_n_threads(self.context, threads, threads)
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        self.steps = 0

    def feed(self, tokens: list[int]) -> Tensor:
        """Return logits (V,) after the last of the tokens."""
        given = (ctypes.c_int32 * len(tokens))(*tokens)
        if self.library.llama_decode(self.context, self.library.llama_batch_get_one(given, len(tokens))):
            raise RuntimeError("llama.cpp does not take the tokens")
        logits = torch.empty(self.vocab_size)
        ctypes.memmove(logits.data_ptr(), self.library.llama_get_logits_ith(self.context, -1), logits.nbytes)
        return logits

    def step(self, tokens: list[int]) -> Tensor:
        """Feed the next token of sequences 0 ... n - 1; return logits (n, V), valid until the next call.

        All sequences begin together at start().
        """
        n = len(tokens)
        ids, places, ones, numbers = (
            (ctypes.c_int32 * n)(*part) for part in (tokens, [self.steps] * n, [1] * n, range(n))
        )
        sequences = (ctypes.c_void_p * n)(*[ctypes.addressof(numbers) + 4 * i for i in range(n)])
        wanted = (ctypes.c_int8 * n)(*[1] * n)
        arrays = (ids, None, places, ones, sequences, wanted)
        batch, given = Batch(n, *[part and ctypes.addressof(part) for part in arrays]), Opaque()
        ctypes.memmove(given.words, ctypes.byref(batch), ctypes.sizeof(batch))
        if self.library.llama_decode(self.context, given):
            raise RuntimeError(f"llama.cpp does not take a token of {n} sequences")
        self.steps += 1
        logits = (ctypes.c_float * (n * self.vocab_size)).from_address(
            self.library.llama_get_logits(self.context)
        )
        return torch.frombuffer(logits, dtype=torch.float32).view(n, -1)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of a text; `special`: also recognise control tokens in it, as chat programs do."""
        data = text.encode()
        found = (ctypes.c_int32 * (len(data) + 1))()
        count = self.library.llama_tokenize(self.vocab, data, len(data), found, len(found), False, special)
        if count < 0:
            raise RuntimeError(f"llama.cpp does not tokenise {text!r}")
        return list(found[:count])

    def decode(self, ids: list[int]) -> bytes:
        text = ctypes.create_string_buffer(128 * len(ids) + 1)  # World's longest token has 128 bytes
        count = self.library.llama_detokenize(
            self.vocab, (ctypes.c_int32 * len(ids))(*ids), len(ids), text, len(text), False, True
        )
        return text.raw[:count]

    def ends(self, token: int) -> bool:
        """Tell whether generation stops after this token."""
        return self.library.llama_vocab_is_eog(self.vocab, token)

    def chat_template(self) -> str | None:
        text = self.library.llama_model_chat_template(self.model, None)
        return text and text.decode()

    def chat(self, messages: list[dict], ask: bool) -> str | None:
        """Write the conversation by llama.cpp's C function, which recognises some templates by pieces of
        their text; None if it does not recognise this one.
        """
        given = (Message * len(messages))(
            *(Message(m["role"].encode(), m["content"].encode()) for m in messages)
        )
        text = ctypes.create_string_buffer(1 << 16)
        count = self.library.llama_chat_apply_template(
            self.chat_template().encode(), given, len(messages), ask, text, len(text)
        )
        return None if count < 0 else text.raw[:count].decode()
