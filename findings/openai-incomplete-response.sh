#!/bin/sh
# openai (Python): the stream of a response that reached its limit has no final response.
#
# Expected: `client.responses.stream(...)` ends with the event response.completed or, where `max_output_tokens` was reached,
# response.incomplete, as the API's reference has it; `get_final_response()` gives the response of either.
# Seen with 3.57.0: after response.incomplete it raises RuntimeError "Didn't receive a `response.completed` event.",
# though the event itself was given out, with the whole response in it.
# FastServe's `/v1/responses` sends response.incomplete (openai_api/responses.py); clients take it from the event.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check openai==3.57.0
"$work/venv/bin/python" - <<'PY'
import json
from importlib.metadata import version

import httpx2
import openai

RESPONSE = {
    "id": "resp_1", "object": "response", "created_at": 0, "model": "m", "output": [], "error": None,
    "incomplete_details": None, "instructions": None, "metadata": {}, "parallel_tool_calls": True,
    "temperature": 1.0, "top_p": 1.0, "tool_choice": "auto", "tools": [], "status": "in_progress",
}
ENDS = {
    "completed": {"status": "completed"},
    "incomplete": {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}},
}


def final(end):
    responses = [("created", RESPONSE), (end, RESPONSE | ENDS[end])]
    body = ""
    for number, (kind, response) in enumerate(responses):
        event = {"type": f"response.{kind}", "sequence_number": number, "response": response}
        body += f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
    headers = {"content-type": "text/event-stream"}
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, headers=headers, text=body))
    client = openai.OpenAI(api_key="none", base_url="http://x", http_client=httpx2.Client(transport=transport))
    with client.responses.stream(model="m", input="x") as stream:
        seen = [event.type for event in stream]
        assert seen == ["response.created", f"response.{end}"], seen
        try:
            return stream.get_final_response().status
        except RuntimeError as error:
            return repr(error)


print("openai", version("openai"))
came = {end: final(end) for end in ENDS}
print(came)
assert came["completed"] == "completed"
assert "Didn't receive" in came["incomplete"], "changed: an incomplete response is a final one"
PY
