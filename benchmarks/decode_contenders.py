"""Contenders of benchmarks.decode and decode_batches on one base: our decoder, `rwkv`, llama.cpp."""

import importlib.util
import os
import pathlib

import torch

from rwkv_miss import inject, merge_file, read_checkpoint, save_adapter, write_checkpoint
from src import ops
from src.export import TextSettings, export
from src.inference.adapters import BASE, Adapters
from src.inference.cpu_decoder import Decoder
from src.model import RWKV, default_arch

from . import llama


def write_base(path, version: int, layers: int, width: int) -> None:
    """Write a random bf16 checkpoint in which every part of the model influences the logits."""
    torch.manual_seed(0)
    tensors = {}
    for name, p in RWKV(default_arch(version, layers, width)).state_dict().items():
        noise = torch.randn(p.shape)
        if name == "emb.weight":
            p = noise
        elif p.squeeze().dim() < 2:
            p = p + 0.05 * noise
        elif name.endswith(".weight"):
            p = noise / p.shape[-1] ** 0.5
        else:
            p = p + 0.1 * noise
        tensors[name] = p.bfloat16()
    write_checkpoint(path, tensors.items())


class Ours:
    def __init__(self, path, dtype: torch.dtype, int8: bool = False):
        self.model = RWKV.load(path, dtype, kernel=ops.choose("cpu", "cpu")[0]).eval()
        self.int8, self.decoders = int8, {}
        self.bytes = 0
        for name, p in self.model.named_parameters():
            quantised = int8 and name.endswith(".weight") and p.numel() > 1e5
            if name != "emb.weight":
                self.bytes += p.numel() if quantised else p.nbytes

    def start(self, threads: int) -> None:
        torch.set_num_threads(threads)
        if threads not in self.decoders:
            self.decoders[threads] = Decoder(self.model, int8=self.int8)
        self.decoder, self.begun = self.decoders[threads], False

    def feed(self, tokens: list[int]) -> torch.Tensor:
        if self.begun and len(tokens) == 1:
            return self.decoder.step(tokens, [BASE])[0]
        logits, state = self.decoder.read(
            torch.tensor([tokens]), self.decoder.take(0) if self.begun else None
        )
        self.decoder.put(0, state)
        self.begun = True
        return logits[0]


class Adapted(Ours):
    """A bf16 base with an unmerged adapter, or with one merged in fp32."""

    def __init__(self, path, adapter, merged: bool):
        super().__init__(path, torch.bfloat16)
        adapters = Adapters(self.model, {"miss": adapter})
        if not merged:
            self.bytes += sum(change.B.nbytes for change in adapters.by_name["miss"].factors.values())
            adapters.use(["miss"])
            return
        merge_file(path, adapter, f"{adapter}.merged", "fp32")
        weights = read_checkpoint(f"{adapter}.merged")
        for name, linear in adapters.linears.items():
            linear.weight = torch.nn.Parameter(weights[f"{name}.weight"].clone(), requires_grad=False)
            self.bytes += linear.weight.numel() * 2


def write_adapter(path, base, rank: int, method: str = "miss") -> None:
    """Write a random adapter of a base."""
    model = RWKV.load(base)
    inject(model, method, rank=rank)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.01)
    save_adapter(model, path)


class Package:
    """The package `rwkv`, with TorchScript. Environment variables choose the version when it is imported."""

    def __init__(self, path, strategy: str, version: int):
        os.environ |= {"RWKV_V7_ON": str(int(version == 7)), "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
        from rwkv.model import RWKV as Model

        self.model, self.version = Model(str(path).removesuffix(".pth"), strategy), version

    def start(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.state = self.model.generate_zero_state() if self.version == 7 else None

    def feed(self, tokens: list[int]) -> torch.Tensor:
        single = len(tokens) == 1 and self.version == 7
        logits, self.state = self.model.forward(tokens[0] if single else tokens, self.state)
        return logits


def llama_contenders(
    folder: pathlib.Path | None, base: pathlib.Path, kinds, sequences: int = 1
) -> dict[str, llama.Llama]:
    """Load llama.cpp with the base in these kinds of weights; {} and a message if llama.cpp is absent."""
    absent = ""
    if folder is None:
        absent = "give --llama the folder of its libraries"
    elif not importlib.util.find_spec("gguf"):
        absent = "the package gguf, which writes its files, is absent: pip install gguf"
    if absent:
        print(f"llama.cpp is not measured: {absent}")
        return {}
    library, found = llama.load_library(folder), {}
    for kind in kinds:
        file = str(base.with_name(f"{kind}.gguf"))
        export(base, file, "gguf", kind, settings=TextSettings("none"))
        found[f"llama {kind}"] = llama.Llama(library, file, max(4096, 256 * sequences), sequences)
    return found
