# The HTTP service on NVIDIA GPUs. See docs/service.md.
#
#   docker build -t idgen .
#   docker run --gpus all -p 8000:8000 -v idgen:/data -e IDGEN_SERVE_API_KEYS=a-long-secret idgen
#
# PyTorch's wheels bring their own CUDA libraries, so the base needs none: the driver comes from the host through the
# NVIDIA container toolkit. onnxruntime-gpu uses the same libraries, which PyTorch, imported first, has loaded.

FROM python:3.12-slim-bookworm AS build

# insightface compiles an extension where it has no wheel.
RUN apt-get update && apt-get install -y --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/idgen
ENV PATH=/opt/idgen/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# The heavy layer first: it stays in the cache while idgen's own code changes.
RUN pip install "torch>=2.4" --index-url https://download.pytorch.org/whl/cu128

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY idgen idgen
COPY adapters adapters
COPY pipelines pipelines
COPY weights weights
COPY demo demo
COPY training training
RUN pip install ".[serve]" \
    # onnxruntime and onnxruntime-gpu share a folder: the last one installed must be the one for GPUs.
    && pip uninstall --yes onnxruntime \
    && pip install "onnxruntime-gpu>=1.18"


FROM python:3.12-slim-bookworm

# curl for the health check; libgomp for onnxruntime and PyTorch.
RUN apt-get update && apt-get install -y --no-install-recommends curl libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 idgen \
    && install --directory --owner=idgen --group=idgen /data
COPY --from=build /opt/idgen /opt/idgen

USER idgen
WORKDIR /data
VOLUME /data
# Inside a container every address is the container's own; the service still refuses to start without a key.
ENV PATH=/opt/idgen/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/data/huggingface \
    IDGEN_HOME=/data/idgen \
    IDGEN_SERVE_HOST=0.0.0.0 \
    IDGEN_SERVE_PORT=8000
EXPOSE 8000
# Loading SDXL from a cold disk takes minutes; until then the process lives but is not ready.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["curl", "--fail", "--silent", "http://127.0.0.1:8000/healthz"]
# SIGTERM lets running requests finish: give docker stop as long (--time 120).
STOPSIGNAL SIGTERM
ENTRYPOINT ["idgen"]
CMD ["serve"]
