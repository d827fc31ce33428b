#!/bin/sh
# Importing the config of a model from transformers imports torch's compiler and its distributed tensors.
#
# Expected: a config is names and numbers; `PreTrainedConfig`, which all are made of, is imported in half a second, and
# brings nothing of torch but what `import torch` does. Seen with transformers 5.23.0 and torch 2.13.0: `LlamaConfig` takes
# one to two seconds more, for its fields are checked by `transformers.utils.type_validators`, which imports the
# activations, these the kernels of the hub, and these continuous batching, torch._dynamo and torch.distributed.tensor.
# A server that reads a config as it starts waits for that. FastServe reads GGUF files of its own decoder without it.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 torch==2.13.0 numpy==1.26.4
"$work/venv/bin/python" - <<'PY'
import importlib.metadata
import sys
import time

import torch

HEAVY = ("torch._dynamo", "torch.distributed.tensor", "transformers.activations", "transformers.generation.continuous_batching")


def imported(name):
    """Seconds, and which of the heavy modules are there afterwards."""
    start = time.perf_counter()
    import transformers

    getattr(transformers, name)
    seconds, found = time.perf_counter() - start, [module for module in HEAVY if module in sys.modules]
    print(f"{name}: {seconds:.2f} s, {', '.join(found) or 'none of them'}")
    return found


print(f"transformers {importlib.metadata.version('transformers')}, torch {torch.__version__}")
assert not imported("PreTrainedConfig"), "changed: the base class brings them already"
assert imported("LlamaConfig") == list(HEAVY), "changed: a config brings fewer of them"
PY
