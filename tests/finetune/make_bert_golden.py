#!/usr/bin/env python3
"""Regenerates the files in golden/: what Python's transformers and PEFT compute and write.

    python3 -m pip install torch transformers peft safetensors
    python3 make_bert_golden.py ../../.deps/minilm

- tiny/: a random two-layer BERT, and what it makes of a padded batch (expected.safetensors)
- tiny_adapter/: a random LoRA adapter for it, written by PEFT, and the same batch with it
- minilm_expected.safetensors: token ids and mean-pooled embeddings of a few sentences by the real MiniLM
"""

import json
import pathlib
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

HERE = pathlib.Path(__file__).parent / "golden"

SENTENCES = [
    "A gorgeously elaborate continuation of the trilogy.",
    "Effective but too tepid biopic",
    "It never quite finds its tone, and the jokes (such as they are) fall flat; still, I laughed twice.",
    "Jirí Hubac's script is a gem.",
    "No.",
    "If you sometimes like to go to the movies to have fun, Wasabi is a good place to start.",
]


def mean_pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def randomize(tensors, scale: float, generator: torch.Generator) -> None:
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))


def expected(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        hidden = model.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
    return {"tokens": ids, "mask": mask.bool(), "hidden": hidden, "pooled": mean_pool(hidden, mask)}


def make_tiny() -> None:
    generator = torch.Generator().manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=24,
        position_embedding_type="absolute",
    )
    model = BertModel(config)
    randomize(model.parameters(), 0.4, generator)
    model.save_pretrained(HERE / "tiny")
    ids = torch.randint(5, 64, (3, 9), generator=generator)
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 6 + [0] * 3])
    ids[mask == 0] = config.pad_token_id
    save_file(expected(model, ids, mask), HERE / "tiny" / "expected.safetensors")

    lora = LoraConfig(
        task_type="FEATURE_EXTRACTION",
        r=3,
        lora_alpha=6,
        lora_dropout=0.0,
        target_modules=["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    )
    adapted = get_peft_model(model, lora)
    adapted.peft_config["default"].base_model_name_or_path = "tiny"
    randomize([p for name, p in adapted.named_parameters() if "lora_" in name], 0.3, generator)
    adapted.save_pretrained(HERE / "tiny_adapter")
    (HERE / "tiny_adapter" / "README.md").unlink(missing_ok=True)
    save_file(expected(adapted, ids, mask), HERE / "tiny_adapter" / "expected.safetensors")


def make_minilm(folder: str) -> None:
    batch = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    result = expected(AutoModel.from_pretrained(folder), batch["input_ids"], batch["attention_mask"])
    del result["hidden"]
    save_file(result, HERE / "minilm_expected.safetensors", metadata={"sentences": json.dumps(SENTENCES)})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make_tiny()
    make_minilm(sys.argv[1])
