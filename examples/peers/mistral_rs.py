"""mistral.rs as a peer of `fastserve bench`.

In an environment of its own, with `mistralrs` and `tokenizers`; DIR holds a checkpoint as Hugging Face has
it, or FILE is a GGUF file in DIR:

    fastserve bench --peer "mistral.rs=ENVIRONMENT/bin/python examples/peers/mistral_rs.py DIR [FILE]"

mistral.rs takes text alone: a prompt's tokens are decoded for it, and become about as many again. Its Python
package (0.9.5) serves one request at a time: a second one raises while the first streams.
See `fastserve.benchmark.peers.AdapterTarget` for what is read and written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mistralrs
from tokenizers import Tokenizer


def main() -> None:
    """Serves until the input ends."""
    directory = Path(sys.argv[1])
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    if len(sys.argv) > 2:
        which = mistralrs.Which.GGUF(str(directory), sys.argv[2], tok_model_id=str(directory))
    else:
        which = mistralrs.Which.Plain(str(directory))
    runner = mistralrs.Runner(which=which, max_seqs=1)
    _say(ready=True)
    for line in sys.stdin:
        _serve(runner, tokenizer, json.loads(line))


def _serve(runner: Any, tokenizer: Any, request: dict[str, Any]) -> None:
    stream = runner.send_chat_completion_request(
        mistralrs.ChatCompletionRequest(
            model="default",
            messages=tokenizer.decode(request["prompt_token_ids"]),
            max_tokens=request["max_tokens"],
            temperature=0.0,
            ignore_eos=True,
            stream=True,
        )
    )
    num_tokens = 0
    for chunk in stream:
        if chunk.usage is not None:
            _say(id=request["id"], num_tokens=chunk.usage.completion_tokens - num_tokens, done=False)
            num_tokens = chunk.usage.completion_tokens
        elif chunk.choices and num_tokens < request["max_tokens"]:
            _say(id=request["id"], num_tokens=1, done=False)
            num_tokens += 1
    _say(id=request["id"], num_tokens=0, done=True)


def _say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
