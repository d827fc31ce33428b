"""A typed client of FastServe: text from the ensemble `fastserve`, over gRPC or HTTP, sync or async.

    with Client("127.0.0.1:8001") as client:
        print(client.generate("The capital of France is", max_tokens=8, temperature=0).text)
        for chunk in client.stream(messages=[{"role": "user", "content": "Hello"}], priority=10):
            print(chunk.text, end="", flush=True)

It needs `tritonclient`, grpcio, aiohttp and numpy; neither torch nor the rest of FastServe.
"""

from fastserve_client.client import AsyncClient, Client
from fastserve_client.encoder_request import Classification, RankedDocument, TokenLabel
from fastserve_client.errors import DeadlineExceeded, FastServeError
from fastserve_client.generation import Chunk, Completion, Generation, Logprob, Timing
from fastserve_client.options import GuidedDecoding, Message, Options, Sampling
from fastserve_client.stream import AsyncStream, Stream

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Chunk",
    "Classification",
    "Client",
    "Completion",
    "DeadlineExceeded",
    "FastServeError",
    "Generation",
    "GuidedDecoding",
    "Logprob",
    "Message",
    "Options",
    "RankedDocument",
    "Sampling",
    "Stream",
    "Timing",
    "TokenLabel",
]
