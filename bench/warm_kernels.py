"""Compiles what `coterie bench kernels` needs of one model, into Triton's cache: `python bench/warm_kernels.py MODEL`.

Every format and number of tokens once, without graphs, peers and repeats, so that several models can be compiled side by side.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch

from coterie.launch.bench_kernels import FORMATS, TOKENS, chosen_shapes, too_large
from coterie.launch.kernel_cases import Layer


def main(model: str) -> None:
    """One line."""
    calls = 0
    for shape, format in product(chosen_shapes(False, model), FORMATS):
        if too_large(shape, format):
            continue
        layer = Layer(shape, format, "cuda", copies=1)
        for count in TOKENS:
            layer.ours(layer.inputs(count))(0)
            calls += 1
        torch.cuda.synchronize()
        del layer
        torch.cuda.empty_cache()
    print(f"{model}: {calls} layers")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    main(parser.parse_args().model)
