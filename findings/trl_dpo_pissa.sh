#!/usr/bin/env bash
# DPO's reference under a PiSSA or OLoRA adapter is not the model that training begins with.
#
# Guess: DPOTrainer with a peft_config takes the model without its adapter for the reference. Before the first step policy
# and reference are the same, so the first loss is ln 2 = 0.693 whatever the adapter's start.
# Found (TRL 1.16.0, PEFT 0.21.2, torch 2.13.0, on a CPU): PiSSA and OLoRA move a part of the base weights into the adapter.
# Without it the reference is what is left of the weights. A tiny Llama's first loss, at learning rate 0: 0.693 with LoRA's
# usual start and "orthogonal", 0.906 with "pissa", 0.958 with "olora".
#
# Takes some minutes and 5 GB in a temporary folder. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip --disable-pip-version-check -q install trl==1.16.0 datasets==5.2.0 accelerate==1.15.0 peft==0.21.2 transformers==5.24.0 torch==2.13.0 numpy
cat >check.py <<'PYTHON'
import math
import sys
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

words = ["<pad>", "<eos>", "<unk>", *"the a cat dog sat ran on mat good bad".split()]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
rows = [{"prompt": "the cat", "chosen": " sat on a mat", "rejected": " ran bad"},
        {"prompt": "a dog", "chosen": " ran on", "rejected": " sat the mat"}] * 4
losses = {}
for init in (True, "orthogonal", "pissa", "olora"):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, initializer_range=0.2))
    lora = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=init, lora_dropout=0.0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(output_dir=folder, max_steps=1, per_device_train_batch_size=8, learning_rate=0.0,
                              logging_steps=1, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True)
        trainer = DPOTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows),
                             processing_class=tokenizer, peft_config=lora)
        trainer.train()
    (losses[init],) = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
for init, loss in losses.items():
    print(f"init_lora_weights={init!r}: the first loss is {loss:.4f}; ln 2 is {math.log(2):.4f}")
as_found = all(abs(losses[init] - math.log(2)) < 1e-4 for init in (True, "orthogonal"))
as_found = as_found and all(abs(losses[init] - math.log(2)) > 0.02 for init in ("pissa", "olora"))
sys.exit(0 if as_found else "another behaviour than in TRL 1.16.0 and PEFT 0.21.2")
PYTHON
venv/bin/python check.py
