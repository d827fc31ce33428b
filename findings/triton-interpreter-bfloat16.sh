#!/bin/sh
# Triton's interpreter (TRITON_INTERPRET=1) casts float32 to bfloat16 by cutting bits off.
#
# Expected: round half to even, as compiled kernels and torch do. Seen with Triton 3.6.0 and numpy 1.26.4: the low
# 16 bits are dropped, so results are too near to zero, by up to a whole unit in the last place. The documentation
# says that the interpreter has no arithmetic in bfloat16 and advises casts; of the casts themselves it says nothing.
# FastServe rounds in its kernels before such a cast, so that they can be tested interpreted
# (kernels/fastserve_kernels/gpu/arithmetic.py).
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.6.0 torch==2.13.0 numpy==1.26.4
cat > "$work/cast.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def cast(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(tl.bfloat16))


x = torch.tensor([1.0, 1.006, 0.1, -0.1])
y = torch.empty(4, dtype=torch.bfloat16)
cast[(1,)](x, y, 4)
cut_off = (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
print(f"triton {triton.__version__}, torch {torch.__version__}")
print(f"float32              {x.tolist()}\ninterpreted bfloat16 {y.tolist()}\ntorch's bfloat16     {x.bfloat16().tolist()}")
assert torch.equal(y, cut_off), "changed: the bits are not cut off any more"
assert not torch.equal(y, x.bfloat16())
PY
TRITON_INTERPRET=1 "$work/venv/bin/python" "$work/cast.py"
