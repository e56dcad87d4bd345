#!/usr/bin/env bash
# llama.cpp's converter of PEFT adapters transposes the changes of GPT-2's layers.
#
# Guess: convert_lora_to_gguf.py gives a GPT-2 adapter (fan_in_fan_out) the A [r, in] and B [out, r] of PEFT's file, as of
# any linear layer; or it refuses it.
# Found (llama-cpp-python 0.3.36, which carries llama.cpp's script; PEFT 0.21.2, transformers 5.24.0): GPT-2's own weights
# lie as [in, out], so the script transposes them, and with them the adapter's B A, which PEFT keeps as [out, in] also
# there. Of c_attn, PEFT's default target, the file's change is [in, out], another shape than the weight's in a GGUF file;
# of attn.c_proj, which is square, it is the transposed of PEFT's change, and nothing says so.
#
# Takes some minutes and 2 GB in a temporary folder. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
pip=(venv/bin/python -m pip --disable-pip-version-check -q)
"${pip[@]}" install peft==0.21.2 transformers==5.24.0 torch==2.13.0 safetensors==0.8.0 gguf==0.19.0 sentencepiece \
  'scikit-build-core[pyproject]'
"${pip[@]}" download --no-deps --no-binary :all: --no-build-isolation llama-cpp-python==0.3.36
tar xzf llama_cpp_python-0.3.36.tar.gz
cat >check.py <<'PYTHON'
import pathlib, subprocess, sys

import torch
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

script = next(pathlib.Path(".").glob("llama_cpp_python-*/vendor/llama.cpp/convert_lora_to_gguf.py"))
torch.manual_seed(0)
config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0)
GPT2LMHeadModel(config).save_pretrained("base")
for kind, name in (("attn.c_attn", "attn_qkv"), ("attn.c_proj", "attn_output")):
    base = GPT2LMHeadModel.from_pretrained("base")
    before = base.transformer.h[0].get_submodule(kind).weight.detach().clone()
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=[kind], fan_in_fan_out=True,
                                            init_lora_weights=False))
    model.save_pretrained(kind)
    subprocess.run([sys.executable, script, "--base", "base", "--outtype", "f32", "--outfile", f"{kind}.gguf", kind],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(f"{kind}.gguf").tensors}
    a, b = (tensors[f"blk.0.{name}.weight.lora_{factor}"] for factor in "ab")
    found = 8 / 4 * b @ a
    after = model.merge_and_unload().transformer.h[0].get_submodule(kind).weight.detach()
    wanted = (after - before).T
    same, transposed = (found.shape == change.shape and torch.allclose(found, change, atol=1e-5)
                        for change in (wanted, wanted.T))
    print(f"{kind}: PEFT's change, [out, in], is {list(wanted.shape)}, the file's {list(found.shape)}; "
          f"the same: {same}, transposed: {transposed}")
    assert transposed and not same, "the converter does something else now"
PYTHON
venv/bin/python check.py
