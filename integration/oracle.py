"""The same model in `transformers`: what the tests compare with, and the benchmark too.

The weights come through `gguf.GGUFReader`, not through `reference_llm`, so that nothing is shared but the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class Oracle:
    """A `LlamaForCausalLM` with the weights of a GGUF file, in float32."""

    def __init__(self, path: str, device: str = "cpu") -> None:
        reader = gguf.GGUFReader(path)
        self.device = device
        config = _config(reader)
        self.model = _model(config)
        weights = {}
        for tensor in reader.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if ".attn_q." in tensor.name:
                values = _halves(values, config.num_attention_heads)
            if ".attn_k." in tensor.name:
                values = _halves(values, config.num_key_value_heads)
            weights[_name(tensor.name)] = torch.from_numpy(np.array(values))
        if config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        self.model.load_state_dict(weights)
        self.model.to(device)

    def continue_greedily(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Exactly ``max_tokens`` most likely tokens for each of ``prompts``, computed as one padded batch."""
        longest = max(map(len, prompts))
        ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        with torch.inference_mode():
            out = self.model.generate(
                torch.tensor(ids, device=self.device),
                attention_mask=torch.tensor(mask, device=self.device),
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        continued: list[list[int]] = out[:, longest:].tolist()
        return continued


def _config(reader: gguf.GGUFReader) -> Any:
    def value(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    return LlamaConfig(
        vocab_size=int(next(t for t in reader.tensors if t.name == "token_embd.weight").shape[1]),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=None,
        eos_token_id=None,
    )


def _model(config: Any) -> Any:  # transformers' own types are not used: they cost the checker minutes
    model: Any = LlamaForCausalLM(config)
    return model.eval()


def _name(gguf_name: str) -> str:
    *_, block, part, kind = (".." + gguf_name).split(".")
    if gguf_name.startswith("blk."):
        return f"model.layers.{block}.{_LAYER_NAMES[part]}.{kind}"
    return f"{_NAMES[part]}.{kind}"


def _halves(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Undoes the order of rows that GGUF files have for rotary embeddings: pairs of neighbours become two halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
