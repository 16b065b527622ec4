"""Decode steps of a random model with our kernels in a CUDA graph and under torch.compile, against the same steps one by one.

python bench/cuda_graph.py [--small]   # --small: one layer's experts alone and no graphs, for compute-sanitizer
"""

from __future__ import annotations

import sys
from itertools import product

import torch

from coterie.kernels.formats import FORMATS, quantise
from coterie.kernels.fused import FusedExperts

SIZES = (((512, 256), (256, 256)), (1, 2, 16, 64, 300)), (((8192, 256), (256, 4096)), (1, 16))  # tokens; the deep one in parts
TOLERANCE = 5e-3


def reference(experts: FusedExperts, x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Float64 on the weights as they are stored."""
    first, second = experts.first.dequantised(), experts.second.dequantised()
    assert experts.activation is not None
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for slot in range(ids.shape[1]):
        inner = experts.activation(torch.einsum("tnk,tk->tn", first[ids[:, slot]], x.double()))
        out += torch.einsum("tnk,tk->tn", second[ids[:, slot]], inner) * gates[:, slot, None].double()
    return out


def layers(graphs: bool) -> None:
    """Every format and number of tokens: near float64, and a replayed graph gives the bits of a plain call.

    graphs: capturing one needs torch's allocator, which hides from the sanitizer what lies out of bounds.
    """
    torch.manual_seed(0)
    for (sizes, counts), format in product(SIZES, FORMATS):
        weights = (torch.randn(8, *size, device="cuda").bfloat16() / 16 for size in sizes)
        experts = FusedExperts(*(quantise(w, format) for w in weights))
        for tokens in counts:
            x = torch.randn(tokens, 256, device="cuda").bfloat16()
            ids = torch.rand(tokens, 8, device="cuda").topk(2, 1).indices
            gates = torch.rand(tokens, 2, device="cuda")
            found, right = experts(x, ids, gates).double(), reference(experts, x, ids, gates)
            error = ((found - right).norm(dim=1) / right.norm(dim=1)).max().item()
            assert error < TOLERANCE, (format, tokens, error)
            torch.cuda.synchronize()
            if not graphs:
                continue
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
    """Greedy text with a static cache: compiled (which makes CUDA graphs of decode steps) as without."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    import coterie.moe.layer  # noqa: F401  registers the implementation

    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_hidden_layers=4,
        num_experts=16, num_experts_per_tok=4, moe_intermediate_size=128, intermediate_size=256, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="coterie").cuda().eval()
    ids = torch.arange(12, device="cuda")[None] + 7
    texts = []
    for compiled in (False, True):
        if compiled:
            made.forward = torch.compile(made.forward, mode="reduce-overhead", fullgraph=True)
        asked = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": "static"}
        texts.append(made.generate(ids, disable_compile=True, **asked).tolist())  # it would compile by itself
    assert texts[0] == texts[1], "compiled text differs"
    print("compiled decode with CUDA graphs: the same text")


if __name__ == "__main__":
    layers("--small" not in sys.argv)
    if "--small" not in sys.argv:
        model()
