#!/usr/bin/env python3
"""Are the decoders of which `finetune merge` writes embedding and output apart those that transformers says?

    tied_decoders_test.py examples/finetune/adapters/tied_decoders.hpp

kTiedDecoders has the kinds (model_type) whose causal language model ties "lm_head.weight" to
"model.embed_tokens.weight" and nothing else, and has no model within it. Without transformers 5.24.0 the test is
skipped: later releases have more.
"""

import re
import sys

import interop_test  # noqa: F401  finds a Python with transformers
import transformers

SKIPPED = 77


def kinds_of_transformers():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    result = set()
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        model = getattr(transformers, name, None)
        if model is None or kind not in transformers.CONFIG_MAPPING:
            continue
        ties = getattr(model, "_tied_weights_keys", None)
        within = getattr(transformers.CONFIG_MAPPING[kind], "sub_configs", None)
        if ties == {"lm_head.weight": "model.embed_tokens.weight"} and not within:
            result.add(kind)
    return result


def main():
    if transformers.__version__ != "5.24.0":
        print(f"skipped: this is transformers {transformers.__version__}, expected 5.24.0")
        return SKIPPED
    with open(sys.argv[1], encoding="utf-8") as file:
        table = file.read().split("kTiedDecoders[] = {")[1].split("}")[0]
    ours, theirs = set(re.findall(r'"(\w+)"', table)), kinds_of_transformers()
    for kind in sorted(ours ^ theirs):
        print(f"{kind}: only in {'tied_decoders.hpp' if kind in ours else 'transformers'}")
    print(f"{len(ours & theirs)} kinds in both")
    return 0 if ours == theirs and len(ours) > 100 else 1


if __name__ == "__main__":
    sys.exit(main())
