#!/bin/sh
# torch's gloo all-reduce gives an element other bits when the tensor around it is longer or shorter.
#
# Expected: the sum of the same numbers over the same ranks has the same bits, wherever in a tensor they are. Seen with
# torch 2.13.0: with two ranks it has; from three on the order in which ranks are added differs from piece to piece of the tensor,
# and the pieces are cut by its length, so that a sum of float32 differs in its last bits with the length of the batch.
# FastServe promises a request the same text whatever it is batched with (`seed`), so its ranks do not add by gloo.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==1.26.4
cat > "$work/reduce.py" <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LENGTHS = (4, 64, 256, 1000, 4096)


def rank_main(rank, ranks, work):
    dist.init_process_group("gloo", init_method=f"file://{work}/store{ranks}", rank=rank, world_size=ranks)
    x = torch.randn(LENGTHS[-1], generator=torch.Generator().manual_seed(rank))
    sums = []
    for length in LENGTHS:
        sums.append(x[:length].clone())
        dist.all_reduce(sums[-1])
    if rank == 0:
        differing = [int((each != sums[-1][: len(each)]).sum()) for each in sums]
        print(f"{ranks} ranks: elements that differ from those of the longest tensor:", dict(zip(LENGTHS, differing)))
        assert any(differing) == (ranks > 2), "changed: the bits no longer depend on the length, or with two ranks too"
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__)
    for ranks in (2, 3, 4):
        mp.spawn(rank_main, (ranks, sys.argv[1]), nprocs=ranks)
PY
GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}" "$work/venv/bin/python" "$work/reduce.py" "$work"
