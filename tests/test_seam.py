"""Our kernels as transformers' experts implementation: every family by name, compiled graphs, experts in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, make_model
from transformers import AutoModelForCausalLM

import coterie
from coterie.kernels import cpu
from coterie.kernels.experts import fused
from coterie.kernels.formats import LARGEST, quantise
from coterie.moe.layer import _known_activation, stacked
from coterie.moe.quantise import FP8_CAPABILITY
from coterie.routing.errors import InputError
from coterie.routing.record import expert_modules

IDS = torch.tensor([[5, 17, 33, 60, 8, 2, 91, 44, 7]])


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


def loaded(folder: Path, implementation: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation=implementation, dtype=torch.float32).eval()


@torch.no_grad()
def test_from_pretrained_by_name_gives_eagers_logits(family: Path) -> None:
    ours, eager = loaded(family, "coterie")(IDS).logits, loaded(family, "eager")(IDS).logits
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_gpus_kernels_take_every_familys_weights_as_they_lie(family: Path) -> None:
    """Under the interpreter where there is no GPU: one layer's experts against the module's own loop."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = loaded(family, "eager").to(device)
    _, module = next(iter(expert_modules(model).values()))
    known = _known_activation(module)
    assert known is not None, "its activation is one that the kernels know"
    x, count = torch.randn(6, model.config.get_text_config().hidden_size, device=device), module.num_experts
    ids = torch.stack([torch.randperm(count)[:2] for _ in range(6)]).to(device)
    weights = torch.rand(6, 2, device=device)
    torch.testing.assert_close(fused(stacked(module))(x, ids, weights), module(x, ids, weights), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_compiled_model_has_one_graph(name: str, tmp_path: Path) -> None:
    """Whether warm or not: what a module's activation is must not be asked inside the graph."""
    model = loaded(make_model(name, tmp_path), "coterie")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("format", list(LARGEST))
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_rounded_experts_compute_with_the_rounded_weights(name: str, format: str, tmp_path: Path) -> None:
    """Logits are those of the same model with every expert's weights replaced by what they are rounded to."""
    if format == "fp8" and torch.cuda.is_available() and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        pytest.skip("this GPU has no fp8")
    folder = make_model(name, tmp_path)
    replaced, rounded = coterie.load(folder), coterie.load(folder, quantise=format)
    for _, module in expert_modules(replaced.transformers).values():
        for stack in (module.gate_up_proj, module.down_proj):
            view = stack.data.transpose(1, 2) if module.is_transposed else stack.data
            view.copy_(quantise(view, format).dequantised(torch.float32))
    _, module = next(iter(expert_modules(rounded.transformers).values()))
    assert module.down_proj.numel() == 0
    ids = IDS.to(rounded.device)
    torch.testing.assert_close(rounded.transformers(ids).logits, replaced.transformers(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("quantise", [None, "int8"])
def test_a_loaded_model_runs_in_every_autograd_mode(
    monkeypatch: pytest.MonkeyPatch, quantise: str | None, tmp_path: Path
) -> None:
    """Whichever is first: scratch memory made in inference mode is used outside of it, too."""
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(cpu._scratch, "panels", {})
    model = coterie.load(make_model("qwen3_moe", tmp_path), dtype="bfloat16", device="cpu", quantise=quantise).transformers
    ids, found = torch.cat([IDS, IDS], 1), []
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            found += [model(part).logits for part in (ids, ids[:, :1])]
    assert not any(logits.requires_grad for logits in found)
    for step, logits in enumerate(found):
        assert torch.equal(logits, found[step % 2])
    assert cpu._scratch.panels, "both are widened: 24 columns are none that the int8 product takes"


def test_gradients_through_a_loaded_model_are_refused_and_not_dropped(tmp_path: Path) -> None:
    model = coterie.load(make_model("qwen3_moe", tmp_path), device="cpu").transformers
    wished = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with pytest.raises(InputError, match=r"hidden_states: found some that want gradients.*torch\.no_grad\(\)"):
        model(inputs_embeds=wished)


def test_what_does_not_go_with_rounded_experts_is_refused(tmp_path: Path) -> None:
    folder = make_model("qwen3_moe", tmp_path)
    with pytest.raises(InputError, match="--quantise: found 'int3', expected one of int8, int4, fp8"):
        coterie.load(folder, quantise="int3")
    with pytest.raises(InputError, match="--batch-invariant: found it with --quantise, expected one of them"):
        coterie.load(folder, quantise="int8", batch_invariant=True)
    with pytest.raises(InputError, match="--replan: found it with --quantise, expected one of them"):
        coterie.load(folder, quantise="int8").follow("auto", print)
