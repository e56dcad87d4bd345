#!/usr/bin/env bash
# TRL trains the adapter of a 4-bit model in bfloat16, and at its own rate most of A never moves.
#
# Guess: SFTTrainer with a peft_config trains factors in float32, over a 4-bit base as over any other (PEFT makes them so),
# and Adam's first steps move every entry by about the rate.
# Found (TRL 1.16.0, PEFT 0.21.2, bitsandbytes 0.50.2, torch 2.13.0, on a CPU): over a 4-bit base the trainer casts the
# factors to bfloat16 after PEFT made them. At SFTConfig's rate, 2e-5, a step is less than half the distance between two
# numbers of A's size: after 20 steps of AdamW 8 % of A's entries had changed (after 100 steps 10 %), 100 % over a float32
# base. B, which begins at zero, moves.
#
# Takes some minutes and 5 GB in a temporary folder. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip --disable-pip-version-check -q install trl==1.16.0 bitsandbytes==0.50.2 datasets==5.2.0 accelerate==1.15.0 peft==0.21.2 transformers==5.24.0 torch==2.13.0 numpy
cat >check.py <<'PYTHON'
import sys
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

torch.manual_seed(0)
words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(200))]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
texts = [" ".join(words[3 + int(i)] for i in torch.randint(0, 200, (24,))) for _ in range(128)]
base = tempfile.mkdtemp(dir=".")
LlamaForCausalLM(LlamaConfig(vocab_size=len(words), hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=4)).save_pretrained(base)
four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
found = {}
for quantization in (None, four_bits):
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.float32)
    arguments = SFTConfig(output_dir=tempfile.mkdtemp(dir="."), max_steps=20, per_device_train_batch_size=4, report_to=[],
                          save_strategy="no", lr_scheduler_type="constant", use_cpu=True, bf16=False, disable_tqdm=True)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=Dataset.from_dict({"text": texts}),
                         processing_class=tokenizer, peft_config=lora)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_A" in name}
    trainer.train()
    a = {name: p for name, p in trainer.model.named_parameters() if "lora_A" in name}
    moved = sum((p != start[name]).float().mean().item() for name, p in a.items()) / len(a)
    (dtype,) = {p.dtype for p in a.values()}
    found[quantization is not None] = dtype, moved
    print(f"{'4-bit' if quantization else 'float32'} base, rate {arguments.learning_rate}: A is {dtype}, "
          f"{100 * moved:.1f} % of its entries have changed")
as_found = found[False] == (torch.float32, 1.0) and found[True][0] == torch.bfloat16 and found[True][1] < 0.3
sys.exit(0 if as_found else "another behaviour than in TRL 1.16.0")
PYTHON
venv/bin/python check.py
