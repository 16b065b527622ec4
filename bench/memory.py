"""Memory as `generate --dry-run` tells it beside what a process then takes, on random models of several families.

python bench/memory.py            (a few minutes; each family in a process of its own; reads /proc, so Linux only)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

HALF = dict(hidden_size=512, num_hidden_layers=6, num_attention_heads=8, vocab_size=4000, max_position_embeddings=4096)
FAMILIES = {
    "mixtral": dict(intermediate_size=1024, head_dim=64, num_key_value_heads=4),
    "qwen3_moe": dict(moe_intermediate_size=1024, head_dim=64, num_key_value_heads=4),
    "deepseek_v3": dict(moe_intermediate_size=1024, kv_lora_rank=256, qk_rope_head_dim=64, num_key_value_heads=8),
    "gpt_oss": dict(intermediate_size=1024, head_dim=64, num_key_value_heads=4),
    "jamba": dict(intermediate_size=1024, num_key_value_heads=4),
    "lfm2_moe": dict(moe_intermediate_size=1024, layer_types=["conv", "full_attention"] * 3, num_key_value_heads=4),
}
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 200, 9


def status(field: str) -> int:
    """A field of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(folder: str) -> dict[str, int]:
    """Told and taken by this process; the peak is that of loading and of running."""
    from coterie.moe.batch import Request
    from coterie.moe.collectives import Group
    from coterie.moe.generate import Sampling
    from coterie.moe.memory import estimate, workload
    from coterie.moe.model import assembled
    from coterie.moe.prepare import prepare
    from coterie.moe.sizes import sizes_of

    share = prepare(folder, None, "float32", 1)
    requests = [Request(i, tuple(range(3, 3 + PROMPT_TOKENS)), NEW_TOKENS) for i in range(PROMPTS)]
    (told,) = estimate(sizes_of(share.shape, share.empty, share.dtype), share.plan, "local", workload(requests, PROMPTS))
    before = status("VmRSS")
    model = assembled(share, share.read(0), None, Group())
    loaded = status("VmRSS")
    model.transformers.generation_config.eos_token_id = None
    model.run(requests, PROMPTS, Sampling(), model.settle(requests, PROMPTS)[0])
    return {**told.to_json(), "loaded": loaded - before, "peak": status("VmHWM") - before}


def main() -> None:
    """One row a family."""
    from tiny_models import make_model

    from coterie.launch.tables import table

    rows = []
    for family, changes in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            make_model(family, Path(folder) / "m", **{**HALF, **changes})
            command = [sys.executable, __file__, str(Path(folder) / "m")]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        weights = found["dense"] + found["experts"]
        megabytes = [found[f] / 1e6 for f in ("states", "buffers", "total")]
        rows.append(
            [family, weights / 1e6, found["loaded"] / 1e6, *megabytes, found["peak"] / 1e6, found["peak"] / found["total"]]
        )
    header = ["family", "weights", "after loading", "states", "buffers", "total", "peak", "peak / total"]
    print(table(header, rows))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
