"""What `coterie bench kernels` times on a GPU: a layer of well-known models, how long it takes at least, who else runs it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from coterie.kernels.activations import Activation
from coterie.kernels.formats import GROUP, Weights, quantise
from coterie.kernels.fused import FusedExperts
from coterie.routing.errors import CoterieError

L2_BYTES = 256 << 20  # what must be read between two readings of the same weights, at least: five times the largest L2
STORED = {"plain": 2.0, "int8": 1.0, "int4": 0.5 + 4 / GROUP, "fp8": 1.0}  # bytes of a weight, scales included
MOST_COPIES = 8
CHECKED, WRONG = 4, 2e-2  # tokens of a cell that are computed anew, about, and the error from which on it is no figure
GPT_OSS = Activation("silu", True, True, 7.0, 1.702, 1.0)
WARM = 3  # replays that are not counted
GRAPH_SECONDS, MOST_ROUNDS = 1e-3, 20  # a graph lasts that long, or has that many rounds
Call = Callable[[int], torch.Tensor]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """One layer: experts E, picks a token K, hidden size H, an expert's inner size I.

    turned: gpt-oss's form, plain weights stored as `[E, H, 2I]` and `[E, I, H]`, gates and ups in turns, biased and clamped.
    """

    name: str
    experts: int
    top_k: int
    hidden: int
    inner: int
    turned: bool = False

    @property
    def weights(self) -> int:
        """Of one expert: gate, up and down."""
        return 3 * self.hidden * self.inner

    def hit(self, tokens: int) -> float:
        """Experts that `tokens` tokens visit, if all are equally likely."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)

    def flops(self, tokens: int) -> float:
        """Of all products of a layer."""
        return 2.0 * tokens * self.top_k * self.weights

    def bytes(self, tokens: int, format: str, hit: float | None = None) -> float:
        """Weights of the experts hit, read once; input, output, routing; the inner rows, written and read.

        hit: experts, None for `hit`.
        """
        moved = tokens * (4 * self.hidden + 8 * self.top_k) + 4 * tokens * self.top_k * self.inner
        return (self.hit(tokens) if hit is None else hit) * self.weights * STORED[format] + moved


SHAPES = (
    Shape("Mixtral 8x7B", 8, 2, 4096, 14336), Shape("Qwen3-30B-A3B", 128, 8, 2048, 768),
    Shape("OLMoE-1B-7B", 64, 8, 2048, 1024),
    Shape("DeepSeek-V3", 256, 8, 7168, 2048), Shape("gpt-oss-120b", 128, 4, 2880, 2880, True),
)  # fmt: skip
TINY = Shape("tiny", 4, 2, 32, 16)


@dataclass(frozen=True)
class Machine:
    """What the device can do, measured on it in the same run. bandwidth: bytes a second; rate: bfloat16 operations a second."""

    bandwidth: float
    rate: float

    def floor(self, shape: Shape, tokens: int, format: str, hit: float | None = None) -> float:
        """Seconds that a layer takes at least. hit: experts, None for as many as `tokens` visit on average."""
        return max(shape.bytes(tokens, format, hit) / self.bandwidth, shape.flops(tokens) / self.rate)


def measure_machine(device: str) -> Machine:
    """By a copy and a sum, whichever is faster, and by a square product, the best of several."""
    size = 1 << (30 if device == "cuda" else 22)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    side = 8192 if device == "cuda" else 128
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    copied = timed(lambda _: target.copy_(source), 1, device, 20)
    read = timed(lambda _: source.view(torch.float32).sum(), 1, device, 20)
    product = timed(lambda _: a @ b, 1, device, 20)
    return Machine(max(2 * size / min(copied), size / min(read)), 2 * side**3 / min(product))


def timed(call: Call, turns: int, device: str, repeats: int) -> list[float]:
    """Seconds of one call, `repeats` times."""
    once = prepared(call, turns, device)
    return [once() for _ in range(repeats)]


def shared_pool(device: str) -> Any:
    """Memory for several `prepared` calls that are replayed in the order in which they were prepared; None off GPUs."""
    return torch.cuda.graph_pool_handle() if device == "cuda" else None


def prepared(call: Call, turns: int, device: str, pool: Any = None) -> Callable[[], float]:
    """What returns the seconds of one call whenever it is called; call is given 0, 1, 2 and so on, `turns` or more.

    On a GPU all turns are one CUDA graph, as many rounds of them as make launching it small beside it. pool: `shared_pool`'s.
    Raises RuntimeError for what waits for the device: a capture that fails leaves torch's allocator in it for good.
    """
    if device != "cuda":

        def once() -> float:
            started = time.perf_counter()
            for turn in range(turns):
                call(turn)
            return (time.perf_counter() - started) / turns

        return once
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())  # what made the inputs
    with torch.cuda.stream(side):
        for turn in range(turns):
            call(turn)
        side.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        side.synchronize()
    once = _captured(call, turns, pool)
    rounds = max(1, min(MOST_ROUNDS, round(GRAPH_SECONDS / (turns * min(once() for _ in range(WARM))))))
    if rounds > 1:
        once = _captured(call, turns * rounds, pool)
    for _ in range(WARM):
        once()
    return once


def _captured(call: Call, turns: int, pool: Any) -> Callable[[], float]:
    """What replays the turns as one CUDA graph, and returns the seconds of one of them."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # the graph's pool is its own, and while it is made torch's allocator gives nothing back
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for turn in range(turns):
            call(turn)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def replayed() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / turns

    return replayed


def copies_past_cache(shape: Shape, format: str) -> int:
    """Of a layer's weights, used in turn, so that what one token reads of one is out of the cache when it is read again."""
    read = shape.hit(1) * shape.weights * STORED[format]
    return 1 if read >= L2_BYTES else min(MOST_COPIES, 1 + math.ceil(L2_BYTES / read))


class Layer:
    """Random experts of one shape, in as many copies as it takes to read past the L2 cache, and inputs for them."""

    def __init__(
        self, shape: Shape, format: str, device: str, dtype: torch.dtype = torch.bfloat16, copies: int | None = None
    ) -> None:
        self.shape, self.format, self.device, self.dtype = shape, format, device, dtype
        self.copies = copies or (copies_past_cache(shape, format) if device == "cuda" else 1)
        self.experts = [self._made() for _ in range(self.copies)]

    def _made(self) -> FusedExperts:
        first, second = (self._weights(*size) for size in self._sizes())
        if not self.shape.turned:
            return FusedExperts(first, second, Activation())
        one, other = (torch.randn(w.shape[:2], device=self.device, dtype=self.dtype) for w in (first, second))
        return FusedExperts(first, second, GPT_OSS, one, other)

    def _sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (2 * self.shape.inner, self.shape.hidden), (self.shape.hidden, self.shape.inner)

    def _weights(self, outputs: int, inputs: int) -> Weights:
        """An expert at a time: a whole stack in float32 would not fit."""
        made = [
            quantise(torch.randn(1, outputs, inputs, device=self.device, dtype=self.dtype) / inputs**0.5, self.format)
            for _ in range(self.shape.experts)
        ]
        scale = torch.cat([w.scale for w in made if w.scale is not None]) if self.format != "plain" else None
        data = torch.cat([w.data for w in made])
        if self.shape.turned and self.format == "plain":
            data = data.transpose(1, 2).contiguous().transpose(1, 2)
        return Weights(data, self.format, scale, inputs)

    def inputs(self, tokens: int) -> Inputs:
        """x `[T, H]`; ids `[T, K]`, distinct, all equally likely; weights `[T, K]`. The same for the same number of tokens."""
        draw = torch.Generator(self.device).manual_seed(tokens)
        x = torch.randn(tokens, self.shape.hidden, device=self.device, dtype=self.dtype, generator=draw)
        ids = torch.rand(tokens, self.shape.experts, device=self.device, generator=draw).topk(self.shape.top_k, 1).indices
        return x, ids, torch.rand(tokens, self.shape.top_k, device=self.device, generator=draw)

    def ours(self, inputs: Inputs, tiles: Any = None) -> Call:
        """The whole layer: ordering, both products, the weighted sum."""
        x, ids, weights = inputs
        return lambda turn: self.experts[turn % self.copies](x, ids, weights, tiles)

    def peers(self, inputs: Inputs, packages: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Call] | str]]:
        """Others on the same plain weights, by name: what prepares the call, or why there is none.

        transformers' implementations that can be captured in a graph, and packages: `bench_kernels.found_packages`.
        """
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        if self.format != "plain":
            return
        x, ids, weights = inputs
        modules = [_as_module(experts) for experts in self.experts]
        for name in ["grouped_mm"] + (["batched_mm"] if len(x) <= 64 else []):
            run = ALL_EXPERTS_FUNCTIONS[name]
            yield f"transformers {name}", partial(self._peer, run, modules, x, ids, weights.to(x.dtype))
        for name, peer in packages.items():
            if isinstance(peer, str):
                yield name, peer
            elif self.shape.turned:
                yield name, "it has no kernel for weights in this layout"
            else:
                yield name, partial(peer.layer, self.experts, x, ids, weights)

    def check(self, found: torch.Tensor, inputs: Inputs) -> None:
        """Raises CoterieError for a result that is `WRONG`, or more."""
        if (off := self.error(found, inputs)) > WRONG:
            raise CoterieError(f"wrong by {off:.2g}")

    def error(self, found: torch.Tensor, inputs: Inputs) -> float:
        """The largest error of a row of `found`, over its norm, of some tokens computed in float64 from what is stored."""
        x, ids, weights = inputs
        experts, worst = self.experts[0], 0.0
        assert experts.activation is not None
        for token in range(0, len(x), max(1, len(x) // CHECKED)):
            right = torch.zeros(self.shape.hidden, dtype=torch.float64, device=x.device)
            for slot, expert in enumerate(ids[token].tolist()):
                first, second = (w.expert(expert).dequantised(torch.float64)[0] for w in (experts.first, experts.second))
                z = first @ x[token].double()
                z = z if experts.first_bias is None else z + experts.first_bias[expert]
                y = second @ experts.activation(z)
                right += weights[token, slot] * (y if experts.second_bias is None else y + experts.second_bias[expert])
            worst = max(worst, float((found[token].double() - right).norm() / right.norm()))
        return worst

    def _peer(self, run: Callable[..., torch.Tensor], modules: list[Any], *inputs: torch.Tensor) -> Call:
        return lambda turn: run(modules[turn % self.copies], *inputs)


def _as_module(experts: FusedExperts) -> Any:
    """What transformers' functions ask of an experts module, as its family stores the weights."""
    assert experts.activation is not None
    turned = experts.activation.interleaved
    first, second = (w.data.transpose(1, 2) if turned else w.data for w in (experts.first, experts.second))
    return SimpleNamespace(
        gate_up_proj=first, down_proj=second, gate_up_proj_bias=experts.first_bias, down_proj_bias=experts.second_bias,
        num_experts=experts.experts, has_gate=True, has_bias=turned, is_transposed=turned, is_concatenated=not turned,
        has_post_expert_norm=False, _is_expert_parallel=False, _apply_gate=experts.activation,
    )  # fmt: skip


def median(seconds: list[float]) -> float:
    """Of repeats."""
    return statistics.median(seconds)
