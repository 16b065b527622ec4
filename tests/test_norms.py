"""RMS norms in decode: what is faster gives the bits of the families' own classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, assert_same_steps, make_model
from torch import nn
from transformers import AutoModelForCausalLM

from coterie.moe.norms import plain_norms_again, speed_up_norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_step_of_every_family_has_the_bits_of_its_own_norms(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_model(family, tmp_path)
    plain, fast = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval() for _ in range(2))
    weights = {name: value.clone() for name, value in fast.state_dict().items()}
    speed_up_norms(fast)
    assert all(torch.equal(value, weights[name]) for name, value in fast.state_dict().items())
    changed = [name for name, module in fast.named_modules() if "forward" in vars(module)]
    rounds_last = (family, dtype) == ("gpt_oss", torch.bfloat16)  # after it has weighed: stays as it is
    assert bool(changed) == (not rounds_last and any(type(m).__name__.endswith("RMSNorm") for m in fast.modules()))
    assert_same_steps(plain, fast)
    plain_norms_again(fast)
    assert not any("forward" in vars(module) for module in fast.modules())


class GemmaLikeRMSNorm(nn.Module):
    """Weighs by 1 + weight before it rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(64)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight.float())).type_as(x)


def test_another_norm_of_that_name_stays_as_it_is() -> None:
    norm = GemmaLikeRMSNorm().bfloat16()
    speed_up_norms(norm)
    assert "forward" not in vars(norm) and not norm.weight.any()
