"""OpenVINO GenAI as a peer of `fastserve bench`, with continuous batching and paged attention.

In an environment of its own, with `openvino-genai`, and the model as OpenVINO has it (`optimum-cli export
openvino --model DIR --task text-generation-with-past --weight-format int8 OUT`; that takes `optimum-intel`,
`nncf`, `openvino-tokenizers` and torch, without torchvision):

    fastserve bench --peer "openvino=ENVIRONMENT/bin/python examples/peers/openvino_engine.py OUT"

See `fastserve.benchmark.peers.AdapterTarget` for what is read and written.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as ov_genai


def main() -> None:
    """Serves until the input ends."""
    scheduler = ov_genai.SchedulerConfig()
    scheduler.max_num_seqs = 64
    scheduler.cache_size = 2  # GiB
    scheduler.enable_prefix_caching = True
    threads = len(os.sched_getaffinity(0))
    pipeline = ov_genai.ContinuousBatchingPipeline(
        sys.argv[1], scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
    )
    requests: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    _say(ready=True)
    handles: dict[int, Any] = {}
    while True:
        while not handles or not requests.empty():
            request = requests.get()
            if request is None:
                return
            handles[request["id"]] = _add(pipeline, request)
        pipeline.step()
        for number, handle in list(handles.items()):
            num_tokens = 0
            while handle.can_read():
                num_tokens += sum(len(output.generated_ids) for output in handle.read().values())
            done = handle.get_status() == ov_genai.GenerationStatus.FINISHED
            if num_tokens or done:
                _say(id=number, num_tokens=num_tokens, done=done)
            if done:
                del handles[number]


def _read(requests: queue.Queue[dict[str, Any] | None]) -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    requests.put(None)


def _add(pipeline: Any, request: dict[str, Any]) -> Any:
    config = ov_genai.GenerationConfig(max_new_tokens=request["max_tokens"], ignore_eos=True)
    prompt = ov.Tensor(np.array([request["prompt_token_ids"]], dtype=np.int64))
    return pipeline.add_request(request["id"], prompt, config)


def _say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
