"""Trains coterie-tiny, the small Mixture-of-Experts model that ships with coterie, and writes all that comes with it.

    python -m coterie.moe.tiny.train --out DIR

writes `config.json`, `model.safetensors` (bf16), the byte-level tokenizer, `prompts/*.jsonl` (held-out text) and
`README.md` (the model card, with the figures measured at the end of this run). The same seed, Python, torch and thread
count give the same weights. Three quarters of an hour on one core.

Load balancing is the auxiliary loss of Switch Transformers (Fedus et al., 2021), per layer and over the whole batch
rather than per sequence (Qwen, "Demons in the detail", 2025): it lets a domain or a kind of token keep its own experts.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from coterie.moe.tiny.corpus import DOMAINS, HELD_OUT_SHARE, Document, TrainingText, digest, read_corpus

END_OF_TEXT = 256  # ids 0..255 are the bytes themselves
SHARE = {"python": 0.42, "english": 0.33, "c": 0.17, "tables": 0.08}  # of each batch's rows
BALANCE, ROUTER_Z, LOCALITY = 0.1, 1e-4, 0.02  # weights of the auxiliary losses
PROMPT_BYTES = 384
PROMPTS = {"python": 36, "english": 36, "c": 20, "tables": 6}  # of each kind; tables have few windows that are new
SHORT_PROMPTS = dict.fromkeys(PROMPTS, 4)
PROMPT_FILES = (
    ("calibration", 0, PROMPT_BYTES, PROMPTS),
    ("heldout", 1, PROMPT_BYTES, PROMPTS),
    ("generate", 1, PROMPT_BYTES // 4, SHORT_PROMPTS),
)


def config() -> Qwen3MoeConfig:
    """6 layers of 16 experts, 2 per token: 3.9 M parameters, 1.1 M of them used by a token."""
    return Qwen3MoeConfig(
        vocab_size=257, hidden_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_experts=16, num_experts_per_tok=2, moe_intermediate_size=96, intermediate_size=96, norm_topk_prob=True,
        max_position_embeddings=1024, rope_theta=10_000.0, tie_word_embeddings=True, decoder_sparse_step=1,
        bos_token_id=END_OF_TEXT, eos_token_id=END_OF_TEXT, pad_token_id=END_OF_TEXT,
    )  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token id = byte value; no merges. Built on `tokenizers`, so `AutoTokenizer` reads it without our code."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    symbol = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}  # GPT-2's byte alphabet
    core = Tokenizer(models.BPE(vocab={symbol[b]: b for b in range(256)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=end, bos_token=end, pad_token=end, model_max_length=1024, padding_side="left"
    )


class Stream:
    """One domain's training bytes, documents shuffled and parted by END_OF_TEXT; draws windows at random."""

    def __init__(self, documents: list[Document], rng: np.random.Generator) -> None:
        order = rng.permutation(len(documents))
        parts = [np.frombuffer(documents[i].text.encode(), np.uint8).astype(np.int64) for i in order]
        self.ids = np.concatenate([x for p in parts for x in ([END_OF_TEXT], p)])

    def draw(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """`length` + 1 consecutive ids from a random place."""
        start = int(rng.integers(0, len(self.ids) - length - 1))
        return self.ids[start : start + length + 1]


def auxiliary_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Balance (1 when even), router z-loss and locality, averaged over layers; logits `[tokens, experts]` per layer."""
    total = router_logits[0].new_zeros(())
    picks: list[torch.Tensor] = []
    for logits in router_logits:
        probs = logits.float().softmax(-1)
        chosen = F.one_hot(probs.topk(top_k, -1).indices, logits.shape[-1]).sum(1).float()
        picks.append(chosen + probs - probs.detach())  # counts forward, gradient through the probabilities
        balance = logits.shape[-1] * (chosen.mean(0) / top_k * probs.mean(0)).sum()
        total = total + BALANCE * balance + ROUTER_Z * logits.float().logsumexp(-1).square().mean()
    return total / len(router_logits) + LOCALITY * locality_loss(picks)


def locality_loss(picks: list[torch.Tensor]) -> torch.Tensor:
    """How uncertain an expert leaves the next layer's, and its companion in its own layer, in nats.

    The mean of the conditional entropies H(expert at layer l+1 | expert at layer l) and H(other pick | pick); picks
    `[tokens, experts]` per layer, 1 where picked. Routers of large models come to agree by themselves (ExFlow measures
    it); ones this small do so less the longer they train, so they are asked to.
    """
    others = 1 - torch.eye(picks[0].shape[1])
    joints = [a.T @ b for a, b in pairwise(picks)] + [(a.T @ a) * others for a in picks]
    return torch.stack([_conditional_entropy(j.clamp(min=1e-3)) for j in joints]).mean()


def _conditional_entropy(joint: torch.Tensor) -> torch.Tensor:
    joint = joint / joint.sum()
    return -(joint * (joint / joint.sum(1, keepdim=True)).log()).sum()


def train(corpus: dict[str, list[Document]], steps: int, rows: int, length: int, seed: int) -> Qwen3MoeForCausalLM:
    """AdamW, linear warm-up then cosine to zero, on windows of `length` bytes."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    streams = {d: Stream([x for x in corpus[d] if not x.held_out], rng) for d in DOMAINS}
    model = Qwen3MoeForCausalLM(config())
    model.set_experts_implementation("grouped_mm")
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _learning_rate(s, steps))
    progress = tqdm(range(steps), desc="train", unit="step", mininterval=5)
    for step in progress:
        names = rng.choice(list(SHARE), size=rows, p=list(SHARE.values()))
        batch = torch.from_numpy(np.stack([streams[n].draw(length, rng) for n in names]))
        out = model(input_ids=batch[:, :-1], output_router_logits=True, use_cache=False)
        nats = F.cross_entropy(out.logits.flatten(0, 1), batch[:, 1:].flatten())
        loss = nats + auxiliary_loss(out.router_logits, model.config.num_experts_per_tok)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            progress.set_postfix(nats=f"{nats.item():.3f}")
    return model.eval()


def _learning_rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / 100)
    return warm * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def measure(model: Qwen3MoeForCausalLM, corpus: dict[str, list[Document]], length: int) -> dict[str, Any]:
    """Held-out loss per domain (nats per byte) and affinity of consecutive layers.

    Affinity is the mean over layers and over the experts of a layer, weighted by their load, of the largest
    P(next layer's top-1 expert | this layer's top-1 expert): ExFlow's measure (Yao et al., 2024).
    """
    losses: dict[str, float] = {}
    picks: list[np.ndarray] = []
    trained = TrainingText(corpus)
    for domain in DOMAINS:
        windows = _unseen_windows([d for d in corpus[domain] if d.held_out], length + 1, trained)
        batch = torch.from_numpy(np.stack([np.frombuffer(w, np.uint8).astype(np.int64) for w in windows]))
        out = model(input_ids=batch[:, :-1], output_router_logits=True, use_cache=False)
        losses[domain] = F.cross_entropy(out.logits.float().flatten(0, 1), batch[:, 1:].flatten()).item()
        picks.append(torch.stack([x.argmax(-1) for x in out.router_logits], 1).numpy())
    top1 = np.concatenate(picks)
    load = np.stack([np.bincount(top1[:, layer], minlength=model.config.num_experts) for layer in range(top1.shape[1])])
    return {"nats": losses, "affinity": _affinity(top1, model.config.num_experts),
            "busiest_expert": float((load.max(1) / load.mean(1)).mean())}  # fmt: skip


def _unseen_windows(documents: list[Document], size: int, trained: TrainingText) -> list[bytes]:
    """Up to 32 windows of `size` bytes, evenly spread over the documents, leaving out what the training text repeats."""
    text = "".join(d.text for d in documents if d.text.isascii())
    starts = np.linspace(0, len(text) - size, 96).astype(int)
    windows = [text[s : s + size] for s in starts]
    return [w.encode() for w in windows if not trained.has_seen(w)][:32]


def _affinity(top1: np.ndarray, experts: int) -> list[float]:
    values = []
    for layer in range(top1.shape[1] - 1):
        pairs = np.zeros((experts, experts))
        np.add.at(pairs, (top1[:, layer], top1[:, layer + 1]), 1)
        values.append(float(pairs.max(1).sum() / pairs.sum()))
    return values


def prompts(corpus: dict[str, list[Document]], seed: int) -> dict[str, list[dict[str, str]]]:
    """Held-out prompts: `calibration` to plan from, `heldout` to judge on, `generate` short ones to continue.

    `calibration` comes from other documents than the rest; no prompt repeats text that was trained on or another prompt's.
    """
    rng, trained = np.random.default_rng(seed), TrainingText(corpus)
    files: dict[str, list[dict[str, str]]] = {}
    for name, side, size, counts in PROMPT_FILES:
        files[name] = []
        for domain in DOMAINS:
            documents = [d for d in corpus[domain] if d.held_out and d.side == side and len(d.text) > 2 * PROMPT_BYTES]
            taken = {row["prompt"] for rows in files.values() for row in rows}
            texts = _new_windows(documents, size, counts[domain], rng, trained, taken)
            files[name] += [{"id": f"{domain}-{i}", "domain": domain, "prompt": text} for i, text in enumerate(texts)]
    return files


def _new_windows(
    documents: list[Document], size: int, count: int, rng: np.random.Generator, trained: TrainingText, taken: set[str]
) -> list[str]:
    """Up to `count` distinct ASCII windows that were not trained on, from the documents in turn."""
    found: list[str] = []
    for attempt in range(100 * count):
        text = _window(documents[attempt % len(documents)].text, size, rng)
        if len(text) == size and text.isascii() and text not in taken | set(found) and not trained.has_seen(text):
            found.append(text)
        if len(found) == count:
            break
    return found


def _window(text: str, size: int, rng: np.random.Generator) -> str:
    """`size` characters that begin at the start of a line."""
    start = text.rfind("\n", 0, int(rng.integers(1, len(text) - size))) + 1
    return text[start : start + size]


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# coterie-tiny

A byte-level Mixture-of-Experts language model: `Qwen3MoeForCausalLM`, 6 layers, 16 experts of which a token uses 2,
hidden size 128, {parameters:.2f} M parameters, bf16. It is here so that placement, dispatch and caching can be tried and tested
on a model that was really trained. It writes things that look like Python and English; it knows nothing.

## Data
Text that a Python installation carries (Python {python}): {sizes}.
One document in {share}, by a hash of its name, was held out; the figures and the prompts here are from those, without the
windows of which the training text holds a run of 64 characters (files repeat one another, tables most of all).
SHA-256 of the corpus: `{digest}`.

## Training
`python -m coterie.moe.tiny.train --steps {steps} --rows {rows} --length {length} --seed {seed}`:
{steps} steps of {rows} x {length} bytes, AdamW, {minutes:.0f} minutes on {threads} thread(s), torch {torch}.

Beside the language loss: load balance (Switch Transformers), router z-loss and a locality term, the conditional entropy of
the next layer's experts and of an expert's companions. Routers of large models agree across layers by themselves; without
the term those of this one agree less the longer it trains (0.48 on the measure below after 300 steps, 0.36 after 4500), and
there would be little here for a planner to find. After 300 steps (at a weight of 0.03) it cost 0.02 nats per byte.

## Figures (held-out text, bf16 weights, fp32 arithmetic)
| domain | loss, nats per byte |
|---|---|
{losses}

Affinity, max P(next layer's top-1 expert | this layer's), mean per layer pair: {affinity} (mean {mean_affinity:.2f};
even routing would give 0.06). Busiest expert of a layer: {busiest:.2f} times the mean load.

## Licence
Weights and card: Apache-2.0, as coterie. The prompts are excerpts of CPython's standard library, headers and documentation,
Copyright Python Software Foundation, under the PSF License Version 2 (some modules carry their authors' own notices).
"""


def card(corpus: dict[str, list[Document]], figures: dict[str, Any], run: dict[str, Any]) -> str:
    """The model card, from what was measured; run: the contents of `training.json`."""
    sizes = ", ".join(f"{d} {sum(len(x.text) for x in corpus[d]) / 1e6:.1f} MB" for d in DOMAINS)
    return CARD.format(
        **run, parameters=figures["parameters"] / 1e6, sizes=sizes, share=HELD_OUT_SHARE, minutes=run["seconds"] / 60,
        losses="\n".join(f"| {d} | {figures['nats'][d]:.3f} |" for d in DOMAINS),
        affinity=", ".join(f"{a:.2f}" for a in figures["affinity"]),
        mean_affinity=float(np.mean(figures["affinity"])), busiest=figures["busiest_expert"],
    )  # fmt: skip


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure-only", action="store_true", help="rewrite prompts and card of the model in --out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    corpus, started = read_corpus(), time.perf_counter()
    if not args.measure_only:
        model = train(corpus, args.steps, args.rows, args.length, args.seed)
        model.to(torch.bfloat16).save_pretrained(args.out)
        byte_tokenizer().save_pretrained(args.out)
        settings = {k: getattr(args, k) for k in ("steps", "rows", "length", "seed", "threads")}
        made = {
            "seconds": round(time.perf_counter() - started),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        (args.out / "training.json").write_text(json.dumps({**settings, **made, "digest": digest(corpus)}) + "\n")
    describe(args.out, corpus)


def describe(folder: Path, corpus: dict[str, list[Document]]) -> None:
    """Measure the model in `folder` on held-out text; write its card and its prompts."""
    run = json.loads((folder / "training.json").read_text())
    if run["digest"] != digest(corpus):
        raise SystemExit(f"{folder}: was trained on another corpus (Python {run['python']}): measure it with that Python")
    model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    figures = measure(model, corpus, run["length"]) | {"parameters": sum(p.numel() for p in model.parameters())}
    (folder / "README.md").write_text(card(corpus, figures, run))
    (folder / "prompts").mkdir(exist_ok=True)
    for name, rows in prompts(corpus, run["seed"]).items():
        (folder / "prompts" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
