"""The GPU kernels' oracles in float64, and their compilation for cards that need not be there.

`python -m tests.helpers.triton_problems 90 bfloat16 16 128 64` compiles every kernel as the library launches it,
for sm_90, bfloat16, 16 heads, 128 tokens, width 64, and says what each takes. TRITON_INTERPRET must be unset.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from attncongruence.streaming import low_rank_kernels as low_rank
from attncongruence.streaming import map_kernels
from tests.helpers.problems import randn

HALF = (torch.bfloat16, torch.float16)


def low_rank_loss(factors: list[Tensor], lengths: Tensor, scale: float, scores: torch.dtype | None = None) -> Tensor:
    """`(batch, heads)`: the sum of m-KL over rows, from maps in full; scores in a dtype of their own if given."""
    losses = []
    for b, n in enumerate(lengths.tolist()):
        A, B, C, D = (x[b, :, :n] for x in factors)
        x, y = scale * A @ B.mT, scale * C @ D.mT
        if scores is not None:
            x, y = x.to(scores).to(x.dtype), y.to(scores).to(y.dtype)
        d = x.log_softmax(-1) - y.log_softmax(-1)
        losses.append(((x.softmax(-1) - y.softmax(-1)) * d).sum((-1, -2)))
    return torch.stack(losses)


def mean_map(q: Tensor, k: Tensor, lengths: Tensor, scale: float, scores: torch.dtype | None = None) -> Tensor:
    """`(batch, n, n)`: softmaxes averaged over heads; 0 beyond the lengths."""
    T = q.new_zeros(len(q), q.shape[2], q.shape[2])
    for b, n in enumerate(lengths.tolist()):
        s = scale * q[b, :, :n] @ k[b, :, :n].mT
        if scores is not None:
            s = s.to(scores).to(s.dtype)
        T[b, :n, :n] = s.softmax(-1).mean(0)
    return T


def with_grad(f: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The value of f, and the gradient of its sum, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    value = f(leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def beyond(x: Tensor, lengths: Tensor, dim: int) -> Tensor:
    """Which entries of `(batch, ...)` are beyond a sample's length along a dimension."""
    shape = [1] * x.ndim
    shape[dim] = -1
    position = torch.arange(x.shape[dim], device=x.device).view(shape)
    return (position >= lengths.view(-1, *[1] * (x.ndim - 1))).expand_as(x)


def distance(a: Tensor, b: Tensor) -> float:
    """Of a from b, relative to b."""
    return float((a.double().cpu() - b.double().cpu()).norm() / b.double().norm())


class Recorder:
    """In place of a kernel: takes its launches down."""

    launches: ClassVar[list[tuple[object, dict[str, object]]]] = []

    def __init__(self, kernel: object) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert 0 < grid[0] < 2**31
        return lambda *args, **options: self.launches.append(
            (self.kernel, dict(zip(self.kernel.arg_names, args, strict=False)) | options)
        )


def launches(dtype: torch.dtype, heads: int, n: int, width: int) -> list[tuple[object, dict[str, object]]]:
    """Every kernel with the arguments that the library hands it."""
    Recorder.launches = []
    kernels = [
        (module, name)
        for module in (low_rank, map_kernels)
        for name, value in vars(module).items()
        if hasattr(value, "arg_names") and name.startswith("_")
    ]
    originals = [getattr(module, name) for module, name in kernels]
    for (module, name), kernel in zip(kernels, originals, strict=True):
        setattr(module, name, Recorder(kernel))
    try:
        x, lengths = randn(1, heads, n, width, dtype=dtype), torch.tensor([n])
        low_rank.low_rank_kl(x.float(), x.float(), x, x, lengths, 0.5, True)
        tiles, whole = map_kernels.KernelRows(x, x, lengths, 0.5), slice(0, 1)
        work, T = tiles.map(whole, slice(0, n))
        tiles.grad(whole, slice(0, n), work, T, T, torch.zeros(x.shape), torch.zeros(x.shape))
    finally:
        for (module, name), kernel in zip(kernels, originals, strict=True):
            setattr(module, name, kernel)
    return Recorder.launches


def compiled(kernel: object, arguments: dict[str, object], arch: int) -> object:
    """A kernel, compiled for these arguments as the launcher would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types, constants, aligned = {}, {}, []
    for i, name in enumerate(names):
        value = arguments[name]
        if isinstance(value, Tensor):
            # Memory from PyTorch's allocator is aligned.
            types[name] = (
                "*"
                + {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int64": "i64"}[
                    str(value.dtype).removeprefix("torch.")
                ]
            )
            aligned.append(i)
        elif isinstance(value, float):
            types[name] = "fp32"
        elif name.islower() and value != 1:
            types[name] = "i32"
        else:
            # Sizes of tiles; and numbers that are 1 are compiled in.
            constants[name] = value
    if "constexprs" in inspect.signature(ASTSource).parameters:
        signature = {name: types.get(name, "constexpr") for name in names}
        attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
        source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    else:  # Triton 3.2
        from triton.backends.compiler import AttrsDescriptor

        attrs = {"arg_properties": {"tt.divisibility": aligned}, "cls": "AttrsDescriptor"}
        source = ASTSource(kernel, types, constants=constants, attrs=AttrsDescriptor.from_dict(attrs))
    options = {name: arguments[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def report(arch: int, dtype: torch.dtype, heads: int, n: int, width: int) -> Iterator[dict[str, object]]:
    """What each kernel takes: shared memory, registers and bytes spilled per thread; and which instructions it uses."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for kernel, arguments in launches(dtype, heads, n, width):
        binary = compiled(kernel, arguments, arch)
        line = {"kernel": kernel.__name__, "shared": binary.metadata.shared}
        line["wgmma"], line["mma"] = ("wgmma.mma" in binary.asm["ptx"], "mma.sync" in binary.asm["ptx"])
        if tool.exists():
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                Path(file.name).write_bytes(binary.asm["cubin"])
                dump = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True)
            line["registers"], line["spilled"] = map(int, re.search(r"REG:(\d+) STACK:(\d+)", dump.stdout).groups())
        yield line


if __name__ == "__main__":
    for arch, dtype, heads, n, width in zip(*[iter(sys.argv[1:])] * 5, strict=True):
        for line in report(int(arch), getattr(torch, dtype), int(heads), int(n), int(width)):
            print(json.dumps(line), flush=True)
