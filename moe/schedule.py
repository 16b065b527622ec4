"""Which prompts run side by side where experts are on disk: those that are likely to ask for the same experts.

A batch asks in every layer for the union of its tokens' experts, so the more alike its sequences are, the fewer experts must be
there at once (ExpertFlow's token scheduling, He et al. 2024). There a trained predictor tells a token's experts from its
embedding; here every layer's own router is applied to the embeddings, which needs no training and knows less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from coterie.moe.batch import Request

WINDOW = 2048  # requests that are put in order together
MOST_TOKENS = 256  # of a prompt that are looked at, its last ones
NUMBERS = 128  # that a signature is made of, by a fixed random projection


def in_order(requests: Sequence[Request], routers: Sequence[torch.Tensor], embed: nn.Module, batch_size: int) -> list[Request]:
    """The same requests so that neighbours are alike. routers: `[E, H]` of each layer."""
    if len(requests) <= batch_size or not routers:
        return list(requests)
    ordered: list[Request] = []
    for first in range(0, len(requests), WINDOW):
        window = requests[first : first + WINDOW]
        ordered += [window[i] for i in _chain(_signatures(window, routers, embed), batch_size)]
    return ordered


@torch.no_grad()
def _signatures(requests: Sequence[Request], routers: Sequence[torch.Tensor], embed: nn.Module) -> torch.Tensor:
    """Of length 1, `[n, NUMBERS]`: how often each expert of each layer is the first choice of a prompt's tokens."""
    together = torch.cat([router.float().cpu() for router in routers])
    project = torch.randn(len(together), NUMBERS, generator=torch.Generator().manual_seed(0))
    found = []
    for request in requests:
        tokens = torch.tensor(request.token_ids[-MOST_TOKENS:], device=next(embed.parameters()).device)
        x = F.rms_norm(embed(tokens).float().cpu(), (together.shape[1],))
        picked = [F.one_hot((x @ router.float().cpu().T).argmax(1), len(router)).float().mean(0) for router in routers]
        found.append(torch.cat(picked) @ project)
    return F.normalize(torch.stack(found), dim=1)


def _chain(signatures: torch.Tensor, batch_size: int) -> list[int]:
    """An order in which each is, of those left, most like the mean of the `batch_size` - 1 before it."""
    left, order = torch.ones(len(signatures), dtype=torch.bool), [0]
    left[0] = False
    while len(order) < len(signatures):
        mean = signatures[order[-max(1, batch_size - 1) :]].mean(0)
        nearest = int((signatures @ mean).masked_fill(~left, -torch.inf).argmax())
        order.append(nearest)
        left[nearest] = False
    return order
