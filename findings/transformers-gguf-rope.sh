#!/bin/sh
# transformers loads a GGUF file with another rotary embedding than it says, without a word.
#
# Expected: a file that scales its rotary frequencies, by the keys `llama.rope.scaling.*` or by the tensor `rope_freqs.weight`
# (as files of Llama 3.1 do), is loaded with scaled frequencies, or refused, or warned of. Seen with transformers 5.23.0
# and gguf 0.19.0: the model has the plain frequencies either way, and answers worse the longer the text.
# FastServe reads both itself, and so has no reference in transformers for such files.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    transformers==5.23.0 gguf==0.19.0 torch==2.13.0 numpy==1.26.4 accelerate==1.15.0
"$work/venv/bin/python" - "$work" <<'PY'
import sys

import gguf
import numpy as np
import torch
import transformers

rng = np.random.default_rng(0)
SHAPES = {"token_embd": (32, 64), "output": (32, 64), "output_norm": (64,), "blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,)}
SHAPES |= {f"blk.0.{name}": (64, 64) for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}


def frequencies(name, keys, tensor):
    """Of a small Llama that has been written to a file and loaded."""
    file = gguf.GGUFWriter(f"{sys.argv[1]}/{name}.gguf", "llama")
    for add, value in (("context_length", 128), ("embedding_length", 64), ("block_count", 1), ("feed_forward_length", 64),
                       ("head_count", 2), ("head_count_kv", 2), ("layer_norm_rms_eps", 1e-5), ("vocab_size", 32)):
        getattr(file, f"add_{add}")(value)
    if keys:
        file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        file.add_rope_scaling_factor(4.0)
    for tensor_name, shape in SHAPES.items():
        file.add_tensor(f"{tensor_name}.weight", rng.standard_normal(shape).astype(np.float32))
    if tensor:
        file.add_tensor("rope_freqs.weight", np.full(16, 4.0, np.float32))
    file.write_header_to_file(), file.write_kv_data_to_file(), file.write_tensors_to_file(), file.close()
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file=f"{name}.gguf")
    print(f"{name}: {model.config.rope_parameters}, {model.model.rotary_emb.inv_freq[:3].tolist()}")
    return model.model.rotary_emb.inv_freq


print(f"transformers {transformers.__version__}")
plain = frequencies("plain", False, False)
assert torch.equal(plain, frequencies("keys", True, False)), "changed: the keys are read"
assert torch.equal(plain, frequencies("tensor", False, True)), "changed: the tensor is read"
PY
