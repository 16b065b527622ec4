"""llama.cpp on the model of `coterie bench experts`: its weights written as GGUF, and the same decode and prefill.

Needs llama-cpp-python and gguf (`pip install llama-cpp-python gguf`), which are no dependencies of coterie.
"""

from __future__ import annotations

import ctypes
import importlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from coterie.routing.errors import CoterieError

KINDS = {"BF16": None, "Q8_0": 7, "Q4_K_M": 15}  # llama.cpp's numbers of file types; None: as it is written
CONTEXT, AT_ONCE = 4096, 512  # tokens that it has room for, and of a prompt at a time


def missing() -> str:
    """Why it cannot be run; empty if it can."""
    for name in ("llama_cpp", "gguf"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"llama.cpp: {error}"
    return ""


def write_gguf(model: Any, path: Path) -> None:
    """model: Qwen3-MoE of transformers in bfloat16. Norms and routers are float32, as llama.cpp's own converter has them."""
    gguf: Any = importlib.import_module("gguf")
    config = model.config
    writer = gguf.GGUFWriter(str(path), "qwen3moe")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for name, tensor in _tensors(model):
        if tensor.ndim == 1 or name.endswith("ffn_gate_inp.weight"):
            writer.add_tensor(name, tensor.float().numpy())
        else:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """By llama.cpp's names."""
    inner = model.model
    yield "token_embd.weight", inner.embed_tokens.weight.data
    yield "output_norm.weight", inner.norm.weight.data
    yield "output.weight", model.lm_head.weight.data
    for number, layer in enumerate(inner.layers):
        at, attention, experts = f"blk.{number}.", layer.self_attn, layer.mlp.experts
        yield at + "attn_norm.weight", layer.input_layernorm.weight.data
        yield at + "ffn_norm.weight", layer.post_attention_layernorm.weight.data
        for ours, theirs in (("q_proj", "attn_q"), ("k_proj", "attn_k"), ("v_proj", "attn_v"), ("o_proj", "attn_output")):
            yield f"{at}{theirs}.weight", getattr(attention, ours).weight.data
        yield at + "attn_q_norm.weight", attention.q_norm.weight.data
        yield at + "attn_k_norm.weight", attention.k_norm.weight.data
        yield at + "ffn_gate_inp.weight", layer.mlp.gate.weight.data
        gate, up = experts.gate_up_proj.data.chunk(2, 1)
        yield at + "ffn_gate_exps.weight", gate
        yield at + "ffn_up_exps.weight", up
        yield at + "ffn_down_exps.weight", experts.down_proj.data


def _library() -> Any:
    """llama_cpp, silent."""
    api: Any = importlib.import_module("llama_cpp")
    api.llama_log_set(silent, None)
    return api


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)  # type: ignore[untyped-decorator]
def silent(level: int, text: bytes, data: object) -> None:
    """What llama.cpp says is not shown. Kept by the module for as long as the library may call it."""


class LlamaModel:
    """One file in llama.cpp. threads: for decode and prefill alike; mapped: the file, instead of read into memory."""

    def __init__(self, path: Path, threads: int, mapped: bool = False) -> None:
        self.api: Any = _library()
        settings = self.api.llama_model_default_params()
        settings.use_mmap, settings.n_gpu_layers = mapped, 0
        settings.use_extra_bufts = False  # its AMX products crash on some virtual machines (seen with 0.3.36)
        self.model = self.api.llama_model_load_from_file(str(path).encode(), settings)
        wanted = self.api.llama_context_default_params()
        wanted.n_ctx, wanted.n_batch, wanted.n_ubatch = CONTEXT, AT_ONCE, AT_ONCE
        wanted.n_threads = wanted.n_threads_batch = threads
        self.context = self.api.llama_init_from_model(self.model, wanted) if self.model else None
        if not self.context:
            raise CoterieError(f"{path}: llama.cpp cannot load it")
        self.vocabulary = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))

    def forget(self) -> None:
        """Empty the cache of keys and values."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def feed(self, tokens: list[int]) -> None:
        """The next tokens of the sequence; logits of the last one are computed."""
        made = (self.api.llama_token * len(tokens))(*tokens)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(made, len(tokens))):
            raise CoterieError("llama.cpp: llama_decode failed")

    def decode(self, new: int, prompt: int = 8) -> float:
        """Tokens per second of `new` tokens after a prompt of so many."""
        self.forget()
        for first in range(0, prompt, AT_ONCE):
            self.feed([100 + i % 8 for i in range(first, min(first + AT_ONCE, prompt))])
        started = time.perf_counter()
        for step in range(new):
            self.feed([100 + step % 8])
        return new / (time.perf_counter() - started)

    def prefill(self, length: int) -> float:
        """Tokens per second of a prompt."""
        self.forget()
        started = time.perf_counter()
        self.feed([i % self.vocabulary for i in range(length)])
        return length / (time.perf_counter() - started)

    def close(self) -> None:
        """Give the memory back."""
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)


def quantised(path: Path, kind: str, threads: int) -> Path:
    """The file rounded by llama.cpp to one of KINDS, beside the original."""
    api: Any = _library()
    number, out = KINDS[kind], path.with_name(f"{kind}.gguf")
    if number is None:
        return path
    settings = api.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = number, threads
    if api.llama_model_quantize(str(path).encode(), str(out).encode(), ctypes.byref(settings)):
        raise CoterieError(f"{path}: llama.cpp cannot round it to {kind}")
    return out
