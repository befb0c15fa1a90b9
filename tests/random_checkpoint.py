"""Writes a Llama checkpoint of any size with random weights, sharded, a layer at a time.

python -m tests.random_checkpoint FOLDER --layers 26 --hidden 4096 --tokenizer outputs/models/SmolLM2-135M-Instruct
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mha2mla.shards import without_weights, write_index


def write_checkpoint(folder: Path, tokenizer: str, layers: int, hidden: int, seed: int = 0) -> int:
    """Write it in bfloat16 with grouped-query attention and untied embeddings; returns its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 512,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with without_weights():
        model = LlamaForCausalLM(config)
    generator, parts = torch.Generator().manual_seed(seed), {}
    for name, empty in model.state_dict().items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        parts.setdefault(part, []).append((name, empty.shape))
    for number, named in enumerate(parts.values()):
        file = folder / f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {}
        for name, shape in named:
            tensor = torch.randn(shape, generator=generator) * 0.02 if len(shape) > 1 else torch.ones(shape)
            tensors[name] = tensor.bfloat16()
        save_file(tensors, file, {"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    vocabulary.save_pretrained(folder)
    files = sorted(folder.glob("*.safetensors"))
    write_index(folder, files)
    return sum(file.stat().st_size for file in files)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--tokenizer", required=True)
    words = parser.parse_args()
    print(f"{write_checkpoint(words.folder, words.tokenizer, words.layers, words.hidden) / 1e9:.2f} GB")
