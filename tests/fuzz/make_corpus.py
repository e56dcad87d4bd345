"""Writes the seeds of the fuzzers, well-formed and malformed ones, to corpus/<target>/ beside this file. What a fuzzer
has found (crash-…) lies there as well and is left alone."""

import json
import pathlib
import struct

CORPUS = pathlib.Path(__file__).parent / "corpus"
SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "C64": 8,
    "U16": 2,
    "U32": 4,
    "U64": 8,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
}


def write(target: str, name: str, content: bytes | str) -> None:
    path = CORPUS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def safetensors(header: bytes | str, data: bytes = b"", claimed: int | None = None) -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if claimed is None else claimed) + header + data


def tensor(dtype="F32", shape="[2]", offsets="[0,8]") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


def write_safetensors() -> None:
    good = '{"x":' + tensor() + "}"
    every, at = {"__metadata__": {"format": "pt"}}, 0
    for dtype, size in SIZES.items():
        every[dtype] = {"dtype": dtype, "shape": [1, 2], "data_offsets": [at, at + 2 * size]}
        at += 2 * size
    cases = {
        "every-dtype": safetensors(json.dumps(every), bytes(at)),
        "good": safetensors(good, bytes(8)),
        "surplus": safetensors(good, bytes(9)),
        "truncated": safetensors(good, bytes(7)),
        "nothing": safetensors("{}"),
        "empty": b"",
        "seven-bytes": b"1234567",
        "scalar-and-empty": safetensors(
            '{"s":' + tensor("U8", "[]", "[0,1]") + ',"e":' + tensor("F64", "[0,3]", "[0,0]") + "}", b"a"
        ),
        "misaligned": safetensors(
            '{"a":' + tensor("U8", "[1]", "[0,1]") + ',"b":' + tensor("F64", "[1]", "[1,9]") + "}", bytes(9)
        ),
        "header-longer": safetensors(good, bytes(8), 1000),
        "header-huge": safetensors(good, bytes(8), 2**64 - 1),
        "header-limit": safetensors(good, bytes(8), 100_000_001),
        "overlap": safetensors('{"a":' + tensor() + ',"b":' + tensor(offsets="[4,12]") + "}", bytes(12)),
        "gap": safetensors('{"a":' + tensor() + ',"b":' + tensor(offsets="[12,20]") + "}", bytes(20)),
        "reversed": safetensors('{"x":' + tensor(offsets="[8,0]") + "}", bytes(8)),
        "overflow": safetensors('{"x":' + tensor(shape="[4294967296,4294967296,4294967296]") + "}", bytes(8)),
        "overflow-beside-zero": safetensors('{"x":' + tensor(shape="[0,4611686018427387904,8]", offsets="[0,0]") + "}"),
        "negative": safetensors('{"x":' + tensor(shape="[-2]") + "}", bytes(8)),
        "fraction": safetensors('{"x":' + tensor(shape="[2.5]") + "}", bytes(8)),
        "dimensions": safetensors('{"x":' + tensor("U8", "[" + ",".join(["1"] * 65) + "]", "[0,1]") + "}", bytes(1)),
        "twice": safetensors('{"x":' + tensor() + ',"x":' + tensor() + "}", bytes(8)),
        "deep": safetensors('{"x":' + "[" * 2000),
        "dtype": safetensors('{"x":' + tensor("F4") + "}", bytes(8)),
        "bool": safetensors('{"x":' + tensor("BOOL", "[2]", "[0,2]") + "}", b"\1\2"),
        "not-utf8": safetensors(b'{"\xc3\x28":{}}'),
        "null-byte": safetensors(b"{}\0{"),
        "metadata": safetensors('{"__metadata__":{"a":1}}'),
        "index": json.dumps(
            {"metadata": {"total_size": 8}, "weight_map": {"a": "1.safetensors", "b": "sub/2.safetensors"}}
        ),
        "index-above": json.dumps({"weight_map": {"a": "../1.safetensors"}}),
        "index-three-dots": json.dumps({"weight_map": {"a": ".../1.safetensors"}}),  # found: a name like any other
        "index-absolute": json.dumps({"weight_map": {"a": "/1.safetensors"}}),
        "index-twice": '{"weight_map":{"a":"1","a":"2"}}',
        "index-deep": '{"metadata":' + "[" * 2000,
    }
    for name, content in cases.items():
        write("safetensors", name, content)


def write_adapter_config() -> None:
    peft = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": True,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "rank_pattern": {"^layer.0": 4},
        "alpha_pattern": {"^layer.0": 2.5},
        "modules_to_save": ["head"],
        "layers_to_transform": [0, 1],
        "layers_pattern": "layers",
        "inference_mode": True,
        "peft_version": "0.21.2",
        "loftq_config": {},
        "revision": None,
        "eva_config": {"rho": 2.0, "deep": [[1, -1, 1e-5, "ö"]]},
    }
    write("adapter_config", "peft", json.dumps(peft, indent=2, sort_keys=True))
    write("adapter_config", "least", '{"peft_type":"LORA"}')
    changes = {
        "regex": {"target_modules": ".*\\.q$", "init_lora_weights": "gaussian", "layers_to_transform": 3},
        "all-linear": {"target_modules": "all-linear", "exclude_modules": "head", "rank_pattern": None},
        "rank-zero": {"r": 0},
        "rank-negative": {"r": -1},
        "rank-fraction": {"r": 1.5},
        "rank-huge": {"r": 2**63},
        "rank-text": {"r": "8"},
        "alpha-huge": {"lora_alpha": 1e308},
        "dropout": {"lora_dropout": 2},
        "bias": {"bias": "some"},
        "modules": {"target_modules": [1]},
        "pattern": {"rank_pattern": {"a": 0}},
        "pattern-list": {"alpha_pattern": []},
        "another-type": {"peft_type": "IA3"},
        "no-type": {"peft_type": None},
    }
    for name, change in changes.items():
        write("adapter_config", name, json.dumps(peft | change))
    write("adapter_config", "twice", '{"peft_type":"LORA","r":8,"r":4}')
    write("adapter_config", "deep", '{"peft_type":"LORA","x":' + "[" * 2000)
    write("adapter_config", "list", "[]")
    write("adapter_config", "empty", "")
    write("adapter_config", "not-a-number", '{"peft_type":"LORA","lora_alpha":NaN}')
    write("adapter_config", "not-utf8", b'{"peft_type":"LORA","bias":"\xff"}')
    write("adapter_config", "null-byte", b'{"peft_type":"LORA"}\0')


def write_checkpoint() -> None:
    # Decisions of targets.hpp: one byte an entry, 0 keeps it.
    write("checkpoint", "whole", b"")
    for position in range(0, 42, 7):
        for decision in range(1, 7):
            write("checkpoint", f"entry-{position}-{decision}", bytes(position) + bytes([decision, 64, position]))
    for place in range(0, 1 << 14, 1117):
        write("checkpoint", f"patched-{place}", b"P" + struct.pack(">HBHB", place, 255, place + 9, 0))
    file = b"LORARITE" + struct.pack("<IQ", 1, 4) + b"load" + bytes(8)
    write("checkpoint", "file-checksum", file)
    write("checkpoint", "file-truncated", file[:-1])
    write("checkpoint", "file-later", file[:8] + b"\3" + file[9:])
    write("checkpoint", "file-size", file[:12] + b"\xff" * 8 + file[20:])
    write("checkpoint", "file-magic-alone", file[:8])


if __name__ == "__main__":
    write_safetensors()
    write_adapter_config()
    write_checkpoint()
