"""Decode steps of a random model with our kernels in a CUDA graph and under torch.compile, against the same steps one by one.

python bench/cuda_graph.py [--small] [--only FORMAT]
# --small: one layer's experts alone and no graphs, for compute-sanitizer; --only: of one format, or the `model` alone
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch

from coterie.kernels.formats import FORMATS, Weights, quantise
from coterie.kernels.fused import FusedExperts

# tokens, 50 rows an expert among them, and more picks than are put in order by one launch; the deep one's outputs in parts
SIZES = (((512, 256), (256, 256)), (1, 2, 16, 64, 200, 300, 1200)), (((8192, 256), (256, 4096)), (1, 16, 200))
SMALL = 1, 2, 16, 64  # tokens where every access is looked at: most of the time there is the reference's
TOLERANCE = 5e-3
AGAIN = 50  # plain calls that must give the same bits: what races in registers does not do so always


def reference(experts: FusedExperts, x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Float64 on the weights as they are stored."""
    first, second = experts.first.dequantised(), experts.second.dequantised()
    assert experts.activation is not None
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for slot in range(ids.shape[1]):
        inner = experts.activation(torch.einsum("tnk,tk->tn", first[ids[:, slot]], x.double()))
        out += torch.einsum("tnk,tk->tn", second[ids[:, slot]], inner) * gates[:, slot, None].double()
    return out


def _moved(weights: Weights, place: torch.Tensor) -> Weights:
    """The same experts in a pool of twelve slots, each where `place` says."""

    def moved(values: torch.Tensor) -> torch.Tensor:
        made = values.new_zeros((12, *values.shape[1:]))
        made[place.long()] = values
        return made

    return Weights(
        moved(weights.data), weights.format, None if weights.scale is None else moved(weights.scale), weights.columns
    )


def layers(graphs: bool, formats: Sequence[str]) -> None:
    """Every format and number of tokens: near float64, time and again, and a replayed graph gives the bits of a plain call.

    graphs: capturing one needs torch's allocator, which hides from the sanitizer what lies out of bounds.
    """
    torch.manual_seed(0)
    for (sizes, counts), format in product(SIZES, formats):
        weights = (torch.randn(8, *size, device="cuda").bfloat16() / 16 for size in sizes)
        experts = FusedExperts(*(quantise(w, format) for w in weights))
        place = torch.randperm(12, device="cuda")[:8].int()
        pool = replace(experts, first=_moved(experts.first, place), second=_moved(experts.second, place), table=place)
        for tokens in counts if graphs else [count for count in counts if count in (*SMALL, 1200)]:
            x = torch.randn(tokens, 256, device="cuda").bfloat16()
            ids = torch.rand(tokens, 8, device="cuda").topk(2, 1).indices
            gates = torch.rand(tokens, 2, device="cuda")
            found, right = experts(x, ids, gates), reference(experts, x, ids, gates)
            error = ((found.double() - right).norm(dim=1) / right.norm(dim=1)).max().item()
            assert error < TOLERANCE, (format, tokens, error)
            assert torch.equal(found, pool(x, ids, gates)), (format, tokens, "out of a pool of slots")
            torch.cuda.synchronize()
            if not graphs:
                continue
            assert all(torch.equal(found, experts(x, ids, gates)) for _ in range(AGAIN)), (format, tokens)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = experts(x, ids, gates)
            for _ in range(3):
                x.normal_()
                ids.copy_(torch.rand(tokens, 8, device="cuda").topk(2, 1).indices)
                graph.replay()
                torch.cuda.synchronize()
                assert torch.equal(out, experts(x, ids, gates)), (format, tokens)
    print("a layer: near float64" + ("; graphs equal to plain calls to the bit" if graphs else ""))


def model() -> None:
    """Greedy text with a static cache: with decode steps compiled, and so in CUDA graphs, as without."""
    from torch._dynamo.utils import counters
    from transformers import AutoModelForCausalLM, CompileConfig, Qwen3MoeConfig

    import coterie.moe.layer  # noqa: F401  registers the implementation

    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_hidden_layers=4,
        num_experts=16, num_experts_per_tok=4, moe_intermediate_size=128, intermediate_size=256, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="coterie").cuda().eval()
    ids = torch.arange(12, device="cuda")[None] + 7
    texts = []
    graphs = CompileConfig(mode="reduce-overhead", fullgraph=True)  # transformers compiles decode steps, prefill stays eager
    for more in ({"disable_compile": True}, {"compile_config": graphs}):
        asked = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": "static"}
        texts.append(made.generate(ids, **asked, **more).tolist())
    assert texts[0] == texts[1], "compiled text differs"
    assert counters["stats"]["unique_graphs"], "nothing was compiled"
    assert not counters["inductor"]["cudagraph_skips"], "compiled without CUDA graphs"
    print("compiled decode with CUDA graphs: the same text")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", choices=[*FORMATS, "model"])
    given = parser.parse_args()
    if given.only != "model":
        layers(not given.small, [given.only] if given.only else FORMATS)
    if not given.small and given.only in (None, "model"):
        model()
