#!/bin/sh
# transformers converts the tokenizer of a GGUF file to one that cuts text in another way than the file says, without a word.
#
# Expected: a file whose `tokenizer.ggml.pre` transformers does not know is refused or warned of, and one with
# `tokenizer.ggml.add_space_prefix` false gets no space before the text. Seen with transformers 5.23.0 and gguf 0.19.0: any
# unknown name is taken for GPT-2's (with "smollm", of SmolLM2, llama.cpp cuts out each digit first: two spaces before one
# are one token, here they are two), and `add_space_prefix` is passed over.
# FastServe sets both itself (checkpoints/gguf_tokenizer.py), and refuses names of which it does not know how they cut.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    transformers==5.23.0 gguf==0.19.0 torch==2.13.0 numpy==1.26.4
"$work/venv/bin/python" - "$work" <<'PY'
import sys

import gguf
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTES = list(bytes_to_unicode().values())


def convert(name, model, tokens, **keys):
    """The tokenizer of a file with this vocabulary, as transformers loads it."""
    file = gguf.GGUFWriter(f"{sys.argv[1]}/{name}.gguf", "llama")
    file.add_tokenizer_model(model)
    file.add_token_list(tokens)
    for key, value in keys.items():
        file.add_key_value(f"tokenizer.ggml.{key}", value, gguf.GGUFValueType.get_type(value))
    for add, value in (("context_length", 16), ("embedding_length", 32), ("block_count", 1), ("feed_forward_length", 32),
                       ("head_count", 1)):
        getattr(file, f"add_{add}")(value)
    file.write_header_to_file(), file.write_kv_data_to_file(), file.write_tensors_to_file(), file.close()
    return transformers.AutoTokenizer.from_pretrained(sys.argv[1], gguf_file=f"{name}.gguf")


print(f"transformers {transformers.__version__}")
found = {}
for pre in ("gpt-2", "smollm", "viking"):
    found[pre] = convert(pre, "gpt2", [*BYTES, "ĠĠ"], merges=["Ġ Ġ"], pre=pre).tokenize("x  1")
    print(f"pre {pre!r}: 'x  1' is {found[pre]}")
print("llama.cpp, with 'smollm': ['x', 'ĠĠ', '1']")
pieces = ["<unk>", "<s>", "</s>", "▁", "a", "▁a"]
prefix = convert("prefix", "llama", pieces, scores=[0.0, 0.0, 0.0, -3.0, -2.0, -1.0], token_type=[2, 3, 3, 1, 1, 1],
                 unknown_token_id=0, bos_token_id=1, eos_token_id=2, add_bos_token=False, add_space_prefix=False).tokenize("a")
print(f"add_space_prefix false: 'a' is {prefix}; llama.cpp: ['a']")
assert found["smollm"] == found["viking"] == found["gpt-2"] == ["x", "Ġ", "Ġ", "1"], "changed: names of pre-tokenizers count"
assert prefix == ["▁a"], "changed: add_space_prefix is read"
PY
