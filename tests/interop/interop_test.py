#!/usr/bin/env python3
"""Adapters and checkpoints between this library and Python's peft and transformers, in both directions.

    interop_test.py PROGRAM                  # PROGRAM is interop.cpp, compiled
    interop_test.py PROGRAM MODEL ADAPTER    # a checkpoint and an adapter of `finetune train`, not the cases below

Tiny random models of every kind, and SmolLM2-135M where it is at hand (LORA_RITE_SMOLLM2_DIR, .deps/smollm2):
- PEFT writes an adapter, C++ loads model and adapter: its logits are Python's;
- C++ makes an adapter and writes it, PeftModel.from_pretrained loads it: its logits are those of C++;
- `finetune merge` writes it and the base as one checkpoint, transformers loads it: likewise;
- models with a vision tower, whose tensors have other names in files than in memory: `finetune merge` puts PEFT's
  adapter into them, and transformers computes with the merged checkpoint what PEFT computes.

scripts/setup --tests makes an environment with these libraries, .deps/interop; without it the test is skipped.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import warnings

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]

sys.dont_write_bytecode = True
sys.path.insert(0, str(REPOSITORY / "tests/support"))

import python_packages  # noqa: E402

python = REPOSITORY / ".deps/interop/bin/python"
python_packages.need(
    ["torch", "transformers", "peft", "safetensors"],
    str(python) if python.exists() else None,
    "scripts/setup --tests makes an environment that has them",
)

os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in folders
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import torch  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(2)
warnings.simplefilter("ignore", FutureWarning)  # what one of them calls old in the other
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# Sums of tens of products in float, in another order: some 1e-7. What is wrong is wrong by 1e-2 or more.
TOLERANCE = 1e-5
# A merged weight is rounded once more, in each of up to 30 layers.
MERGING_TOLERANCE = 1e-4
# The adapters must matter, or nothing is shown.
LEAST_EFFECT = 1e-2

DECODER = dict(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
T5 = dict(
    vocab_size=48,
    d_model=16,
    d_kv=4,
    d_ff=24,
    num_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    decoder_start_token_id=0,
    pad_token_id=0,
    eos_token_id=1,
    feed_forward_proj="gated-gelu",
)
BERT = dict(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
)

# name: (class, config, the adapter that Python makes, the one that C++ makes)
CASES = {
    "llama": (
        "LlamaForCausalLM",
        DECODER | dict(tie_word_embeddings=False),
        dict(
            r=4,
            lora_alpha=6,
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 2, "^model.layers.0.mlp.down_proj": 3},
            alpha_pattern={r"layers\.[01]\.self_attn\.v_proj": 9},
        ),
        dict(
            r=3,
            lora_alpha=5,
            target_modules=["q_proj", "k_proj", "o_proj", "up_proj"],
            init_lora_weights="pissa",
            rank_pattern={"o_proj": 2},
            alpha_pattern={"layers.2.*": 4},
        ),
    ),
    "gemma": (
        "GemmaForCausalLM",
        DECODER | dict(head_dim=8, num_key_value_heads=1),
        dict(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj", "gate_proj"], init_lora_weights="pissa"),
        dict(r=3, lora_alpha=4, target_modules="all-linear", use_rslora=True, rank_pattern={"q_proj": 5}),
    ),
    "t5": (
        "T5ForConditionalGeneration",
        T5,
        dict(r=4, lora_alpha=3, target_modules=r".*(SelfAttention|EncDecAttention)\.(q|v)", use_rslora=True),
        dict(
            r=4,
            lora_alpha=6,
            lora_dropout=0.5,
            target_modules=["q", "v", "wo", "wi_0"],
            exclude_modules=["decoder.block.1.layer.1.EncDecAttention.q"],
            layers_to_transform=[1],
            layers_pattern="block",
        ),
    ),
    # Embeddings and output heads, also those that are one matrix (Gemma's, whose embedding is scaled as well).
    "llama_vocabulary": (
        "LlamaForCausalLM",
        DECODER | dict(tie_word_embeddings=False),
        dict(r=4, lora_alpha=6, target_modules=["embed_tokens", "lm_head", "q_proj"]),
        dict(r=3, lora_alpha=5, target_modules=["embed_tokens", "lm_head"], use_rslora=True),
    ),
    "gemma_vocabulary": (
        "GemmaForCausalLM",
        DECODER | dict(head_dim=8, num_key_value_heads=1),
        dict(r=3, lora_alpha=5, target_modules=["embed_tokens", "o_proj"]),
        dict(r=3, lora_alpha=4, target_modules=["embed_tokens", "q_proj"]),
    ),
    "gemma2_output": (
        "Gemma2ForCausalLM",
        DECODER | dict(head_dim=8, num_key_value_heads=1),
        dict(r=3, lora_alpha=5, target_modules=["lm_head"]),
        dict(r=3, lora_alpha=4, target_modules=["lm_head", "embed_tokens"]),
    ),
    "bert": (
        "BertModel",
        BERT,
        dict(r=4, lora_alpha=6, target_modules=["query", "value", "intermediate.dense"], bias="lora_only"),
        dict(
            r=2,
            lora_alpha=3,
            target_modules=["query", "key", "attention.output.dense"],
            use_rslora=True,
            alpha_pattern={"layer.0.attention.self.query": 1.5},
        ),
    ),
}
SMOLLM2 = (
    dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"]),
    dict(r=8, lora_alpha=16, target_modules="all-linear"),
)


TEXT = dict(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
)
ROPE = dict(rope_scaling=dict(type="mrope", mrope_section=[1, 1, 0]))
# name: (class, config, how older files call what transformers writes now)
WRAPPERS = {
    "llava": (
        "LlavaForConditionalGeneration",
        dict(
            text_config=TEXT | dict(model_type="llama"),
            image_token_index=47,
            vision_config=VISION | dict(model_type="clip_vision_model"),
        ),
        {"vision_tower.": "vision_tower.vision_model."},
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        dict(
            text_config=TEXT | dict(model_type="gemma3_text", head_dim=8),
            mm_tokens_per_image=4,
            vision_config=VISION | dict(model_type="siglip_vision_model"),
        ),
        {"vision_tower.": "vision_tower.vision_model."},
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        dict(
            text_config=TEXT | ROPE,
            vision_config=dict(depth=1, embed_dim=16, hidden_size=16, num_heads=4, patch_size=8, mlp_ratio=2),
        ),
        {},
    ),
}


def build(kind: str, options: dict) -> torch.nn.Module:
    """A model of normal weights; its own start is so small that an adapter's fault would hardly show."""
    model_type = getattr(transformers, kind)
    model = model_type(model_type.config_class(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3)
            if "norm" in name.lower() and "weight" in name and "Gemma" not in kind:
                parameter.add_(1)
    return model.eval()


def read(kind: str, folder: pathlib.Path):
    """A model from a checkpoint in which nothing is missing and nothing too much."""
    model, info = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    left_out = {key: sorted(names) for key, names in info.items() if key != "error_msgs"}
    # BERT's pooler is on top of what is compared, and C++ has none.
    left_out["missing_keys"] = [name for name in left_out["missing_keys"] if not name.startswith("pooler.")]
    assert not any(left_out.values()), f"{folder}: {left_out}"
    return model.eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    arguments = dict(input_ids=inputs["tokens"], attention_mask=inputs["mask"].long())
    if "target" in inputs:
        return model(**arguments, decoder_input_ids=inputs["target"], use_cache=False).logits
    result = model(**arguments)
    return result.last_hidden_state if "last_hidden_state" in result else result.logits


def compared(logits: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Without what stands at padding, which is meaningless."""
    return logits if "target" in inputs else logits[inputs["mask"]]


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference, relative to the largest element."""
    assert left.shape == right.shape, (left.shape, right.shape)
    return ((left - right).abs().max() / right.abs().max()).item()


def write_adapter(model: torch.nn.Module, options: dict, inputs: dict, folder: pathlib.Path) -> torch.Tensor:
    """Gives the model an adapter that has moved, writes it, and returns the logits."""
    adapted = get_peft_model(model, LoraConfig(**options)).eval()
    more = {}
    if options.get("init_lora_weights") == "pissa":
        # As PEFT's guide has it: the start, then the difference to it.
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(folder / "start")
        more["path_initial_model_for_weight_conversion"] = str(folder / "start")
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:  # factors, and the biases that are trained with them
                parameter.add_(0.3 * parameter.abs().max().clamp(min=0.3) * torch.randn_like(parameter))
    logits = logits_of(adapted, inputs)
    adapted.save_pretrained(folder / "peft", **more)
    return logits


def prepare(folder: pathlib.Path, kind: str, model: torch.nn.Module, ours: dict, theirs: dict) -> dict:
    """What C++ reads in a case's folder, beside model/; returns what Python knows."""
    vocabulary = model.config.vocab_size
    inputs = {"tokens": torch.randint(3, vocabulary, (3, 9)), "mask": torch.arange(9) < torch.tensor([[9], [6], [4]])}
    if kind.startswith("T5"):
        inputs["target"] = torch.cat([torch.zeros(3, 1, dtype=torch.long), torch.randint(3, vocabulary, (3, 6))], 1)
    save_file(inputs, folder / "inputs.safetensors")
    plain = logits_of(model, inputs)
    wanted = LoraConfig(**{"init_lora_weights": False} | theirs)
    wanted.save_pretrained(folder / "wanted")
    logits = write_adapter(model, ours, inputs, folder)
    return {"kind": kind, "inputs": inputs, "plain": plain, "logits": logits}


def check(folder: pathlib.Path, kind: str, inputs: dict, plain: torch.Tensor, logits: torch.Tensor) -> bool:
    """Compares what C++ wrote into a case's folder; prints a line."""
    plain, logits = compared(plain, inputs), compared(logits, inputs)
    loaded = compared(load_file(folder / "loaded.safetensors")["logits"], inputs)
    made = compared(load_file(folder / "made.safetensors")["logits"], inputs)
    merged = compared(load_file(folder / "merged.safetensors")["logits"], inputs)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that are missing
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # and of what is meant here
        adapted = PeftModel.from_pretrained(read(kind, folder / "model"), folder / "made").eval()
    names = set(load_file(folder / "made/adapter_model.safetensors"))
    of_peft = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    assert of_peft == names, "PEFT has other tensors than C++ wrote"
    differences = {
        "PEFT → C++": distance(loaded, logits),
        "C++ → PEFT": distance(made, compared(logits_of(adapted, inputs), inputs)),
        "C++, merged → transformers": distance(
            merged, compared(logits_of(read(kind, folder / "merged"), inputs), inputs)
        ),
    }
    merging = distance(merged, made)
    effects = [distance(logits, plain), distance(made, plain)]
    good = max(differences.values()) <= TOLERANCE and merging <= MERGING_TOLERANCE and min(effects) >= LEAST_EFFECT
    print(
        f"{folder.name}: {'' if good else 'WRONG: '}"
        + ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        + f"; merging changes the logits by {merging:.1e}, the adapters by {effects[0]:.1e} and {effects[1]:.1e}"
    )
    return good


def prepare_wrapper(folder: pathlib.Path, kind: str, options: dict, older: dict) -> dict:
    model = build(kind, options)
    model.save_pretrained(folder / "model")
    path = folder / "model/model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        now = next((now for now in older if name.startswith(now)), "")
        tensors[older.get(now, "") + name[len(now) :]] = tensor
    save_file(tensors, path, {"format": "pt"})
    inputs = {"tokens": torch.randint(3, 40, (3, 9)), "mask": torch.ones(3, 9, dtype=torch.bool)}
    plain = logits_of(model, inputs)
    target = dict(r=4, lora_alpha=6, target_modules=r".*(language_model|vision_tower|visual).*(q_proj|down_proj|qkv)")
    return {"kind": kind, "inputs": inputs, "plain": plain, "logits": write_adapter(model, target, inputs, folder)}


def check_wrapper(folder: pathlib.Path, kind: str, inputs: dict, plain: torch.Tensor, logits: torch.Tensor) -> bool:
    merged = logits_of(read(kind, folder / "merged"), inputs)
    changed = {
        name
        for name, tensor in load_file(folder / "merged/model.safetensors").items()
        if not torch.equal(tensor, load_file(folder / "model/model.safetensors")[name])
    }
    error, effect = distance(merged, logits), distance(logits, plain)
    good = error <= MERGING_TOLERANCE and effect >= LEAST_EFFECT and any("vis" in name for name in changed)
    print(
        f"{folder.name}: {'' if good else 'WRONG: '}merged by C++ → transformers {error:.1e}, "
        f"{len(changed)} weights; the adapter changes the logits by {effect:.1e}"
    )
    return good


def check_trained(program: str, model: pathlib.Path, adapter: pathlib.Path) -> int:
    """An adapter that was trained here: PEFT's logits are those of C++."""
    kind = json.loads((model / "config.json").read_text())["architectures"][0]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / adapter.name
        folder.mkdir()
        (folder / "model").symlink_to(model.resolve())
        facts = prepare(folder, kind, read(kind, model), *SMOLLM2)  # its random adapter gives way to the trained one
        shutil.rmtree(folder / "peft")
        (folder / "peft").symlink_to(adapter.resolve())
        trained = PeftModel.from_pretrained(read(kind, model), adapter).eval()
        facts["logits"] = logits_of(trained, facts["inputs"])
        subprocess.run([program, str(folder)], check=True)
        return 0 if check(folder, **facts) else 1


def main(program: str) -> int:
    torch.manual_seed(0)
    smollm2 = pathlib.Path(os.environ.get("LORA_RITE_SMOLLM2_DIR", REPOSITORY / ".deps/smollm2")).resolve()
    with tempfile.TemporaryDirectory() as name:
        work, known = pathlib.Path(name), {}
        for case, (kind, options, ours, theirs) in CASES.items():
            folder = work / case
            folder.mkdir()
            model = build(kind, options)
            model.save_pretrained(folder / "model")
            known[folder] = prepare(folder, kind, read(kind, folder / "model"), ours, theirs)
        if (smollm2 / "model.safetensors").exists():
            folder = work / "smollm2"
            folder.mkdir()
            (folder / "model").symlink_to(smollm2)
            known[folder] = prepare(folder, "LlamaForCausalLM", read("LlamaForCausalLM", smollm2), *SMOLLM2)
        else:
            print(f"smollm2: skipped, {smollm2} is not there")
        wrappers = {}
        for case, (kind, options, older) in WRAPPERS.items():
            wrappers[work / case] = prepare_wrapper(work / case, kind, options, older)
        subprocess.run([program, *map(str, known), *map(str, wrappers)], check=True)
        results = [check(folder, **facts) for folder, facts in known.items()]
        results += [check_wrapper(folder, **facts) for folder, facts in wrappers.items()]
    return 0 if all(results) else 1


if __name__ == "__main__":
    if len(sys.argv) == 4:
        sys.exit(check_trained(sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])))
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
