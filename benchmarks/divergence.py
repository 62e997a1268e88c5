"""Measure what rounding costs a chat on a CPU: the divergence of the next token, in nats.

From the decoder in fp32 with the same weights, one token after another: of int8 in panels and with a scale
for each row, of bf16 activations in two parts and in one, and of llama.cpp's Q8_0.

    python -m benchmarks.divergence [--model FILE --text FILE [--tokenizer NAME]] [--sequences 6]
    [--tokens 250]

Without a model it is a random one as in benchmarks.decode, 12 x 768, and random tokens. A text is cut into
that many sequences at equal distances. "Q8_0 in torch" rounds weights and activations as llama.cpp does, in
blocks of 32, and nothing else: for models that llama.cpp does not run. Forms whose instructions the CPU lacks
are computed without them. The last line is JSON.
"""

import argparse
import pathlib
import tempfile
from unittest import mock

import torch
from torch import Tensor, nn

from rwkv_miss import UserError
from src.data.tokenizer import load_tokenizer
from src.export import TextSettings, export
from src.inference import bf16_products, int8_panels
from src.inference.cpu_decoder import Decoder
from src.model import RWKV

from . import llama
from .common import add_integers, argument_parser, report
from .decode_contenders import write_base

# name -> (int8, whether the CPU's instructions for bytes and for bf16 are used, one part)
FORMS = {
    "int8, panels": (True, True, False),
    "int8, a scale a row": (True, False, False),
    "bf16 activations, two parts": (False, True, False),
    "bf16 activations, one part": (False, True, True),
}


def decoder_of(model: RWKV, int8: bool, instructions: bool, one_part: bool) -> Decoder:
    with (
        mock.patch.object(int8_panels, "instruction_is_there", lambda: instructions),
        mock.patch.object(bf16_products, "instruction_is_there", lambda: instructions and not int8),
    ):
        return Decoder(model, int8=int8, bf16_activations=one_part)


def blocks_of_32(x: Tensor) -> Tensor:
    """x (..., n) as int8 numbers times a scale in fp16 for each 32."""
    short = -x.shape[-1] % 32
    parts = nn.functional.pad(x.float(), (0, short)).unflatten(-1, (-1, 32))
    scale = parts.abs().amax(-1, keepdim=True) / 127
    whole = (parts / scale.clamp(min=1e-30)).round() * scale.half().float()
    return whole.flatten(-2)[..., : x.shape[-1]]


def q8_0_in_torch(path) -> RWKV:
    model = RWKV.load(path, torch.float32).eval()
    for linear in (m for m in model.modules() if isinstance(m, nn.Linear)):
        linear.weight.data = blocks_of_32(linear.weight.data)
        linear.register_forward_pre_hook(lambda module, given: (blocks_of_32(given[0]), *given[1:]))
    return model


def one_by_one(feed, sequences: list[list[int]]) -> Tensor:
    """ln p (tokens, V) after every token; feed(token, state) gives logits (V,) and a state."""
    found = []
    for ids in sequences:
        state = None
        for token in ids:
            logits, state = feed(token, state)
            found.append(logits.float().log_softmax(-1).clone())
    return torch.stack(found)


def of_decoder(decoder: Decoder, sequences) -> Tensor:
    def feed(token, state):
        logits, state = decoder.read(torch.tensor([[token]]), state)
        return logits[0], state

    return one_by_one(feed, sequences)


def of_llama(path, sequences, folder) -> Tensor:
    """Raises UserError or OSError where llama.cpp is not there, or does not run this model."""
    file = str(pathlib.Path(folder, "Q8_0.gguf"))
    library = llama.load_library()
    export(path, file, "gguf", "Q8_0", settings=TextSettings("none"))
    running = llama.Llama(library, file)

    def feed(token, state):
        if state is None:
            running.start(1)
        return running.feed([token]), True

    return one_by_one(feed, sequences)


def sequences_of(args: argparse.Namespace, vocabulary: int) -> list[list[int]]:
    if not args.model:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary, (args.sequences, args.tokens), generator=generator).tolist()
    text = pathlib.Path(args.text).read_text("utf-8")
    ids = load_tokenizer(args.tokenizer, vocabulary).encode(text)
    starts = range(0, len(ids), max(1, len(ids) // args.sequences))
    return [ids[start : start + args.tokens] for start in starts][: args.sequences]


def measure(path, args: argparse.Namespace, folder: str) -> dict[str, float]:
    model = RWKV.load(path, kernel="cpu").eval()
    sequences = sequences_of(args, model.arch.vocab_size)
    # in fp32, whatever instructions there are
    exact = of_decoder(decoder_of(model, False, False, False), sequences)
    found = {}

    def add(name: str, got: Tensor) -> None:
        found[name] = float((exact.exp() * (exact - got)).sum(-1).mean())
        print(f"{name:<28} {found[name]:.2e}", flush=True)

    for name, form in FORMS.items():
        add(name, of_decoder(decoder_of(model, *form), sequences))
    rounded = q8_0_in_torch(path)
    add("Q8_0 in torch", torch.cat([rounded(torch.tensor([ids]))[0][0] for ids in sequences]).log_softmax(-1))
    try:
        add("llama.cpp's Q8_0", of_llama(path, sequences, folder))
    except (UserError, OSError) as error:
        print(f"llama.cpp is not measured: {error}")
    return found


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", help="a checkpoint [a random one]")
    parser.add_argument("--text", help="a text file, for --model")
    parser.add_argument("--tokenizer", default="auto", help="of the model [%(default)s]")
    add_integers(parser, sequences=6, tokens=250)
    args = parser.parse_args()
    if args.model and not args.text:
        parser.error("--model needs --text")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = args.model or str(pathlib.Path(folder, "base.pth"))
        if not args.model:
            write_base(path, 7, 12, 768)
        found = measure(path, args, folder)
    report("divergence", model=args.model or "random 12 x 768", kl=found)


if __name__ == "__main__":
    main()
