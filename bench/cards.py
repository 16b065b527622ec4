"""What a card of 8, 16, 24 or 80 GB can be expected to do for well-known models: `python bench/cards.py > docs/cards.md`.

Arithmetic of `coterie.offload.expect` over the models' published shapes and the rates below; nothing here was measured.
"""

from __future__ import annotations

from coterie.offload.expect import Weights

GB = 1e9
CARDS = {8: (270, 14), 16: (450, 25), 24: (900, 25), 80: (3350, 55)}  # GB: memory's and link's GB/s
RESERVE = 1.5 * GB  # of a card: its context, keys and values of a few thousand tokens, buffers
DISK = 5.0  # GB/s of a good NVMe disk
HIGHER = 0.6  # of the requests that even routing would miss, those that recorded routing missed as well
BFLOAT16 = 2.0


def model(billions: float, layers: int, experts: int, top_k: int, hidden: int, inner: int, width: float = BFLOAT16) -> Weights:
    """From all parameters and the shape of the experts; width: bytes of a weight of an expert."""
    one = 3 * hidden * inner
    return Weights((billions * 1e9 - layers * experts * one) * BFLOAT16, one * width, layers, experts, top_k)


MODELS = {
    "OLMoE-1B-7B": model(6.92, 16, 64, 8, 2048, 1024),
    "DeepSeek-V2-Lite": model(15.7, 26, 64, 6, 2048, 1408),
    "Qwen3-30B-A3B": model(30.5, 48, 128, 8, 2048, 768),
    "Mixtral-8x7B": model(46.7, 32, 8, 2, 4096, 14336),
    "GLM-4.5-Air": model(106.0, 45, 128, 8, 4096, 1408),
    "Qwen3-235B-A22B": model(235.0, 94, 128, 8, 4096, 1536),
    "DeepSeek-V3": model(671.0, 58, 256, 8, 7168, 2048),
}


def line(name: str, weights: Weights, card: int) -> str:
    """A row of the table."""
    memory, link = CARDS[card]
    share = weights.share(card * GB - RESERVE)
    if share < 0:
        return f"| {name} | {weights.total / GB:.0f} | {card} | - | the dense part does not fit | |"
    if share >= 1:
        return (
            f"| {name} | {weights.total / GB:.0f} | {card} | all | {1 / weights.seconds(1.0, memory * GB, link * GB):.0f} | |"
        )
    found = (share, 1 - HIGHER * (1 - share))
    from_host, from_disk = ([1 / weights.seconds(hit, memory * GB, rate * GB) for hit in found] for rate in (link, DISK))
    spread = [f"{low:.2g}-{high:.2g}" for low, high in (from_host, from_disk)]
    return f"| {name} | {weights.total / GB:.0f} | {card} | {share:.0%} | {spread[0]} | {spread[1]} |"


def page() -> str:
    """The text of docs/cards.md."""
    rows = [line(name, weights, card) for name, weights in MODELS.items() for card in CARDS]
    rates = "; ".join(f"{card} GB: {memory} and {link}" for card, (memory, link) in CARDS.items())
    return (
        f"""# What a card can be expected to do

Computed by `python bench/cards.py` with the arithmetic of `offload/expect.py`, not measured: tokens a second of one sequence in
bfloat16, at best, where the larger of computing and fetching missing experts is all that counts. The lower figure is for even
routing, where a cache finds the share of experts that it holds; the higher one for routing that misses {HIGHER:.0%} as often:
with a quarter of the experts in memory the recorded routing of three models missed 27% to 76% as often (docs/offload.md;
`coterie cache-sim` tells of a trace of yours). *From host memory*: the host has room for all experts. *From disk*: {DISK:g}
GB/s, and nothing is kept in the host.

Assumed of cards, memory's and link's GB/s: {rates}. Of each {RESERVE / GB:g} GB are kept
for context, keys and values, and buffers.

| model | GB | card, GB | experts on it | tokens/s from host memory | from disk |
|---|---|---|---|---|---|
"""
        + "\n".join(rows)
        + """

`coterie generate MODEL --prompt x --memory SIZE --dry-run` says what fits of a model that is not listed, and how much a
token reads (of one that is here: a hub id is downloaded first).
"""
    )


if __name__ == "__main__":
    print(page(), end="")
