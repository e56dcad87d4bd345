#!/usr/bin/env python3
"""Regenerates golden/config_defaults.json, config_variants.json and tensor_names.json: how transformers reads files.

    python3 -m pip install torch transformers safetensors     # written by transformers 5.24, torch 2.13
    python3 make_config_goldens.py

- config_defaults.json: what each class takes for every field that a config.json may leave out
- config_variants.json: models of golden/ with other fields in their config.json, what transformers computes with them,
  and the tokens it takes; null where it refuses them
- tensor_names.json: of models with a vision tower and of those that are trained here, every tensor's name in memory and
  in the files that transformers writes, and in those of older versions
"""

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from safetensors.torch import load_file, save_file

GOLDEN = pathlib.Path(__file__).parent / "golden"
CLASSES = {
    "llama": "LlamaForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "bert": "BertModel",
}

FIELDS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "max_position_embeddings",
    "rms_norm_eps",
    "pad_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "query_pre_attn_scalar",
    "sliding_window",
    "layer_types",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_decoder_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "dropout_rate",
    "layer_norm_epsilon",
    "feed_forward_proj",
    "decoder_start_token_id",
    "type_vocab_size",
    "layer_norm_eps",
]

FILLED_IN = {
    "llama": ["head_dim", "num_key_value_heads"],
    "gemma2": ["layer_types"],
    "t5": ["num_decoder_layers"],
    "mt5": ["num_decoder_layers"],
}

LLAMA3 = dict(rope_type="llama3", rope_theta=100.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
GONE = "(gone)"
BARE = {"dense_act_fn": GONE, "is_gated_act": GONE}  # as before transformers 5, which writes both
GENERATION = "(generation_config.json)"

# golden: changes of its config.json, one after the other; GONE takes a field out. GENERATION is generation_config.json.
VARIANTS = {
    "llama": [
        {},
        {"num_key_value_heads": 2, "rms_norm_eps": GONE},
        {"hidden_act": GONE},
        {"hidden_act": "gelu"},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"hidden_activation": "relu"},
        {"head_dim": GONE},
        {"head_dim": None},
        {"attention_bias": GONE, "mlp_bias": GONE},
        {"tie_word_embeddings": GONE},
        {"attention_dropout": GONE},
        {"eos_token_id": GONE, "pad_token_id": GONE},
        {"eos_token_id": None},
        {"eos_token_id": [5, 6]},
        {"rope_parameters": GONE},
        {"rope_parameters": GONE, "rope_theta": 100.0},
        {"rope_theta": 100.0, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 100.0},
        {"rope_scaling": {}},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 50.0, "rope_parameters": GONE},
        {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}, "max_position_embeddings": 5},
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}},
        {"rope_parameters": LLAMA3, "original_max_position_embeddings": 16},
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}, "original_max_position_embeddings": 32},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": LLAMA3, "max_position_embeddings": 32},
        {"rope_parameters": LLAMA3, "max_position_embeddings": GONE},
        {GENERATION: {"eos_token_id": [2, 7]}},
        {GENERATION: {"eos_token_id": 7}},
        {"eos_token_id": GONE, GENERATION: {"eos_token_id": [9]}},
    ],
    "gemma": [
        {"hidden_act": GONE},
        {"hidden_act": "gelu"},
        {"hidden_act": "silu"},
        {"hidden_activation": "relu"},
        {"hidden_activation": "gelu"},
        {"hidden_act": "gelu", "hidden_activation": "relu"},
        {"hidden_act": GONE, "hidden_activation": "relu"},
        {"rms_norm_eps": GONE, "attention_bias": GONE},
        {"tie_word_embeddings": GONE},
        {"pad_token_id": GONE, "eos_token_id": GONE},
        {"pad_token_id": None},
        {"rope_parameters": GONE},
        {"sliding_window": 2},
    ],
    "gemma2": [
        {"hidden_activation": GONE},
        {"hidden_activation": "gelu"},
        {"hidden_act": "relu"},
        {"hidden_activation": GONE, "hidden_act": "relu"},
        {"sliding_window": GONE},
        {"layer_types": GONE},
        {"layer_types": None, "sliding_window": 2},
        {"layer_types": GONE, "sliding_window": GONE},
        {"layer_types": ["full_attention", "full_attention"], "sliding_window": None},
        {"attn_logit_softcapping": GONE},
        {"attn_logit_softcapping": None},
        {"final_logit_softcapping": GONE},
        {"final_logit_softcapping": None},
        {"query_pre_attn_scalar": GONE},
        {"query_pre_attn_scalar": 4},
        {"use_bidirectional_attention": False},
    ],
    "t5": [
        {},
        {"feed_forward_proj": GONE},
        {"feed_forward_proj": "gelu"},
        {"dense_act_fn": "gelu_new"},
        BARE,
        BARE | {"feed_forward_proj": GONE},
        BARE | {"feed_forward_proj": "gelu"},
        BARE | {"feed_forward_proj": "gelu_new"},
        {"dense_act_fn": "silu", "feed_forward_proj": "gelu"},
        {"is_gated_act": False, "dense_act_fn": "relu"},
        {"num_decoder_layers": 3, "layer_norm_epsilon": GONE},
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": False, "scale_decoder_outputs": True},
        {"scale_decoder_outputs": False},
        {"tie_word_embeddings": None},
        {"tie_word_embeddings": GONE},
        {"scale_decoder_outputs": GONE},
        {"tie_word_embeddings": False, "scale_decoder_outputs": GONE},
        {"hidden_size": 16},
        {"dropout_rate": GONE, "eos_token_id": GONE, "pad_token_id": GONE},
    ],
    "t5_gated": [
        {"dense_act_fn": "relu"},
        {"dense_act_fn": "gelu"},
        {"feed_forward_proj": "gated-silu"},
        BARE,
        BARE | {"feed_forward_proj": "gated-silu"},
        BARE | {"feed_forward_proj": "gated-gelu_new"},
        {"feed_forward_proj": "gated-silu", "dense_act_fn": "gelu_new"},
        {"feed_forward_proj": "relu"},
        {"feed_forward_proj": "gelu", "is_gated_act": True},
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": True, "scale_decoder_outputs": False},
    ],
    "mt5": [
        {"feed_forward_proj": GONE},
        {"dense_act_fn": "relu"},
        {"tie_word_embeddings": GONE},
        BARE | {"feed_forward_proj": GONE},
        BARE | {"feed_forward_proj": "gated-relu"},
        {"tie_word_embeddings": True},
        {"scale_decoder_outputs": True},
        {"decoder_start_token_id": GONE},
    ],
    "bert": [
        {},
        {"layer_norm_eps": GONE, "type_vocab_size": GONE},
        {"pad_token_id": GONE},
        {"hidden_act": GONE},
        {"tie_word_embeddings": GONE},
        {"position_embedding_type": GONE},
    ],
}


def make_defaults() -> dict:
    made = {}
    for name, kind in CLASSES.items():
        config = getattr(transformers, kind).config_class()
        own = {field.name for field in dataclasses.fields(config)}
        made[name] = {}
        for field in FIELDS:
            if field not in own or (field == "tie_word_embeddings" and name in ("t5", "mt5", "bert")):
                continue
            # What __post_init__ fills in is no default of the field.
            made[name][field] = None if field in FILLED_IN.get(name, ()) else getattr(config, field)
    return made


def folder_of(golden: str) -> pathlib.Path:
    return GOLDEN.parent.parent / "golden" / "tiny" if golden == "bert" else GOLDEN / golden


@torch.no_grad()
def computed(golden: str, changes: dict, work: pathlib.Path) -> dict | None:
    source = folder_of(golden)
    config = json.loads((source / "config.json").read_text())
    for field, value in changes.items():
        config.pop(field, None)
        if value != GONE and field != GENERATION:
            config[field] = value
    (work / "generation_config.json").unlink(missing_ok=True)
    if GENERATION in changes:
        (work / "generation_config.json").write_text(json.dumps(changes[GENERATION]))
    shutil.copy(source / "model.safetensors", work)
    (work / "config.json").write_text(json.dumps(config))
    kind = getattr(transformers, CLASSES[config["model_type"]])
    given = load_file(source / "expected.safetensors")
    inputs = {"input_ids": given["tokens"]}
    if "target" in given:
        inputs["decoder_input_ids"] = given["target"]
    try:
        model, info = kind.from_pretrained(work, attn_implementation="eager", output_loading_info=True)
        wrong = {name for name in info["missing_keys"] | info["unexpected_keys"] if not name.startswith("pooler.")}
        if wrong:
            raise ValueError(f"does not fit: {wrong}")
        if golden == "bert":
            mask = given["mask"]
            values = model.eval()(**inputs, attention_mask=mask.long()).last_hidden_state[mask]
        else:
            values = model.eval()(use_cache=False, **inputs).logits
    except Exception as error:  # of whatever class
        print("refused:", golden, changes, str(error).splitlines()[0][:90])
        return None
    return {
        "values": values.flatten()[::37].tolist(),
        "pad": model.config.pad_token_id,
        "end": (model.generation_config if GENERATION in changes else model.config).eos_token_id,
    }


TEXT = dict(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
)


def wrappers():
    t = transformers
    rope = dict(rope_scaling=dict(type="mrope", mrope_section=[1, 1, 0]))
    llava = dict(text_config=t.LlamaConfig(**TEXT), vision_config=t.CLIPVisionConfig(**VISION), image_token_index=47)
    yield "llava", t.LlavaForConditionalGeneration(t.LlavaConfig(**llava))
    yield "llava_next", t.LlavaNextForConditionalGeneration(t.LlavaNextConfig(**llava))
    yield (
        "gemma3",
        t.Gemma3ForConditionalGeneration(
            t.Gemma3Config(
                text_config=t.Gemma3TextConfig(**TEXT, head_dim=8),
                vision_config=t.SiglipVisionConfig(**VISION),
                mm_tokens_per_image=4,
            )
        ),
    )
    yield (
        "paligemma",
        t.PaliGemmaForConditionalGeneration(
            t.PaliGemmaConfig(
                text_config=t.GemmaConfig(**TEXT, head_dim=8),
                vision_config=t.SiglipVisionConfig(**VISION),
                projection_dim=16,
            )
        ),
    )
    yield (
        "qwen2_vl",
        t.Qwen2VLForConditionalGeneration(
            t.Qwen2VLConfig(
                text_config=TEXT | rope,
                vision_config=dict(depth=1, embed_dim=16, hidden_size=16, num_heads=4, patch_size=8, mlp_ratio=2),
            )
        ),
    )
    yield (
        "qwen2_5_vl",
        t.Qwen2_5_VLForConditionalGeneration(
            t.Qwen2_5_VLConfig(
                text_config=TEXT | rope,
                vision_config=dict(
                    depth=1,
                    hidden_size=16,
                    out_hidden_size=16,
                    num_heads=4,
                    patch_size=8,
                    intermediate_size=24,
                    fullatt_block_indexes=[0],
                ),
            )
        ),
    )


def file_names(model, folder: pathlib.Path) -> list[tuple[str, str]]:
    """Names in memory and in the file that transformers writes: each tensor has another value, by which it is told."""
    with torch.no_grad():
        for number, (_, parameter) in enumerate(model.named_parameters()):
            parameter.fill_(number + 1)
    model.save_pretrained(folder)
    by_value = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        by_value.setdefault(tensor.flatten()[0].item(), name)
    return [
        [name, by_value[parameter.flatten()[0].item()]]
        for name, parameter in model.named_parameters()
        if parameter.flatten()[0].item() in by_value
    ]


def older_names(name: str, kind: str, made: list, folder: pathlib.Path, rules: list[tuple[str, str]]) -> list:
    """The same tensors under the names of older files; transformers reads them, which is what shows that they fit."""

    def older(file: str) -> str:
        for now, before in rules:
            if file.startswith(now):
                return before + file[len(now) :]
        return file

    pairs = [[memory, older(file)] for memory, file in made]
    tensors = load_file(folder / "model.safetensors")
    work = folder.parent / (folder.name + "-old")
    shutil.copytree(folder, work)
    save_file({older(file): tensor for file, tensor in tensors.items()}, work / "model.safetensors", {"format": "pt"})
    model, info = getattr(transformers, kind).from_pretrained(work, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], (name, info)
    values = dict(model.named_parameters())
    for memory, file in made:
        assert torch.equal(values[memory], tensors[file]), (name, memory)
    return pairs


def make_names(work: pathlib.Path) -> list:
    result = []
    for name, model in wrappers():
        folder = work / name
        made = file_names(model, folder)
        result.append({"model_type": name, "names": made})
        kind = type(model).__name__
        if not name.startswith("qwen"):  # what is on the hub
            rules = [("vision_tower.", "vision_tower.vision_model.")]
            result.append({"model_type": name, "names": older_names(name, kind, made, folder, rules)})
            rules = [
                ("language_model.lm_head.", "lm_head."),
                ("language_model.", "model.language_model."),
                ("vision_tower.", "model.vision_tower."),
                ("multi_modal_projector.", "model.multi_modal_projector."),
            ]
            (work / (folder.name + "-old")).rename(work / (folder.name + "-older"))
            result.append({"model_type": name, "names": older_names(name, kind, made, folder, rules)})
    for name, kind in CLASSES.items():
        source = folder_of(name)
        model = getattr(transformers, kind).from_pretrained(source)
        made = file_names(model, work / name)
        result.append({"model_type": name, "names": made})
    return result


def write(name: str, value) -> None:
    (GOLDEN / name).write_text(json.dumps(value, indent=None, separators=(", ", ": ")).replace("}, {", "},\n{") + "\n")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        variants = [
            {
                "golden": golden,
                "changes": {field: value for field, value in changes.items() if value != GONE and field != GENERATION},
                "gone": [field for field, value in changes.items() if value == GONE],
                "generation": changes.get(GENERATION),
                "expected": computed(golden, changes, pathlib.Path(scratch)),
            }
            for golden, several in VARIANTS.items()
            for changes in several
        ]
        names = make_names(pathlib.Path(scratch))
    write("config_defaults.json", make_defaults())
    write("config_variants.json", variants)
    write("tensor_names.json", names)
