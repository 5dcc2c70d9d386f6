# The server of SE-ResViT. How to build and run it: docs/serving.md, Deploy.
#   CPU     docker build -t seresvit .
#   NVIDIA  docker build -t seresvit:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
ARG PYTHON=3.11-slim-bookworm
FROM python:${PYTHON}

# Where torch comes from: builds for the CPU, or PyPI, whose builds bring CUDA with them.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# `serve,export` adds OpenVINO and ONNX Runtime: with the option `--backend auto` faster on a CPU, 280 MB more.
ARG EXTRAS=serve

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1

RUN groupadd --system --gid 10001 seresvit \
    && useradd --system --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent seresvit \
    && install --directory --owner=10001 --group=10001 --mode=0700 /jobs

# Three layers, from the one that changes least to the one that changes most: torch, the libraries, this package.
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" -c constraints.txt torch

COPY pyproject.toml ./
RUN python -c "import tomllib; asked = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    extras = [one for extra in '${EXTRAS}'.split(',') for one in asked['optional-dependencies'][extra]]; \
    print(*asked['dependencies'], *extras, sep='\n')" > requirements.txt \
    && pip install --no-cache-dir -c constraints.txt -r requirements.txt

COPY README.md LICENSE ./
COPY configs configs
COPY src src
RUN pip install --no-cache-dir --no-deps . && rm -rf build

WORKDIR /
# Nothing but the volume and /tmp is written to: `--read-only --tmpfs /tmp` works.
ENV PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HEALTH_URL=http://127.0.0.1:8080/health
USER 10001:10001
VOLUME ["/jobs"]
EXPOSE 8080 11112
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(os.environ['HEALTH_URL'], timeout=8)"]
ENTRYPOINT ["seresvit"]
CMD ["serve", "--checkpoint", "/models/model.safetensors", "--folder", "/jobs", "--host", "0.0.0.0", "--port", "8080", \
    "--token-file", "/run/secrets/seresvit-token"]
