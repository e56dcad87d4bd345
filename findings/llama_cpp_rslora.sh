#!/usr/bin/env bash
# llama.cpp's converter of PEFT adapters does not know rank-stabilised LoRA.
#
# Guess: convert_lora_to_gguf.py reads use_rslora from adapter_config.json, as PEFT does, so that the scale is
# lora_alpha / sqrt(r); what a GGUF adapter has for it is one number, adapter.lora.alpha, which is divided by the rank.
# Found (llama-cpp-python 0.3.36, which carries llama.cpp's script; PEFT 0.21.2, transformers 5.24.0): the field is not
# looked at. The same factors with use_rslora false and true give byte for byte the same file, alpha 8, though PEFT's own
# changes of the weights differ by sqrt(r). The true one would need alpha * sqrt(r).
#
# Takes some minutes and 2 GB in a temporary folder. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
pip=(venv/bin/python -m pip --disable-pip-version-check -q)
"${pip[@]}" install peft==0.21.2 transformers==5.24.0 safetensors==0.8.0 gguf==0.19.0 sentencepiece 'scikit-build-core[pyproject]'
"${pip[@]}" download --no-deps --no-binary :all: --no-build-isolation llama-cpp-python==0.3.36
tar xzf llama_cpp_python-0.3.36.tar.gz
cat >check.py <<'PYTHON'
import hashlib, json, pathlib, subprocess, sys

import torch
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

script = next(pathlib.Path(".").glob("llama_cpp_python-*/vendor/llama.cpp/convert_lora_to_gguf.py"))
torch.manual_seed(0)
config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=2, vocab_size=64, max_position_embeddings=32)
LlamaForCausalLM(config).save_pretrained("base")
hashes, alphas, changes = [], [], []
for rslora in (False, True):
    torch.manual_seed(1)
    base = LlamaForCausalLM.from_pretrained("base")
    before = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], use_rslora=rslora,
                                            init_lora_weights=False))
    folder = pathlib.Path(f"adapter{int(rslora)}")
    model.save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["use_rslora"] is rslora
    subprocess.run([sys.executable, script, "--base", "base", "--outtype", "f32", "--outfile", f"{folder}.gguf", folder],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    reader = GGUFReader(f"{folder}.gguf")
    alphas.append(float(reader.fields["adapter.lora.alpha"].parts[-1][0]))
    hashes.append(hashlib.sha256(b"".join(t.data.tobytes() for t in reader.tensors)).hexdigest())
    merged = model.merge_and_unload().model.layers[0].self_attn.q_proj.weight.detach()
    changes.append((merged - before).norm().item())
a, b = (load_file(f"adapter{i}/adapter_model.safetensors") for i in (0, 1))
assert all(torch.equal(a[key], b[key]) for key in a), "the factors should be the same"
print(f"alpha in the files: {alphas}; same tensors: {hashes[0] == hashes[1]}; PEFT's changes: {changes}")
assert alphas == [8, 8] and hashes[0] == hashes[1], "the converter tells them apart now"
assert abs(changes[1] / changes[0] - 2) < 1e-3, "PEFT's scale is another"
PYTHON
venv/bin/python check.py
