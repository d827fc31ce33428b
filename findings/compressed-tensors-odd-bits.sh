#!/bin/sh
# compressed-tensors 0.18 packs codes of 3 bits (and 5) in another order than 0.17, under the same format name.
#
# Expected: `"format": "pack-quantized"` says how codes lie in `weight_packed`, or a version beside it does. Seen: 0.17.1
# pads each int32 (ten codes of 3 bits), 0.18.0 lets codes cross from one to the next; the name is the same, and only
# the number of words in a row tells which it is. FastServe goes by that number and reads both.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
pip="$work/venv/bin/pip --quiet --disable-pip-version-check"
$pip install compressed-tensors==0.17.1 torch==2.13.0 transformers==5.23.0 numpy==1.26.4 psutil
$pip install --no-deps --target "$work/new" compressed-tensors==0.18.0
cat > "$work/pack.py" <<'PY'
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

codes = (torch.arange(64, dtype=torch.int8) % 8 - 4).reshape(1, 64)
for bits in (4, 3):
    words = pack_to_int32(codes, bits)[0].tolist()
    print(f"64 codes of {bits} bits: {len(words)} words,", *(f"{word & 0xFFFFFFFF:08x}" for word in words))
PY
PYTHONPATH="" "$work/venv/bin/python" "$work/pack.py" > "$work/old.txt"
PYTHONPATH="$work/new" "$work/venv/bin/python" "$work/pack.py" > "$work/new.txt"
for version in old new; do echo "$version:"; cat "$work/$version.txt"; done
grep -q "of 3 bits: 7 words" "$work/old.txt"
grep -q "of 3 bits: 6 words" "$work/new.txt"
test "$(head -n 1 "$work/old.txt")" = "$(head -n 1 "$work/new.txt")"
