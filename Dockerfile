# The README's commands in a container, as a user without privileges:
#
#   docker build -t flame_ext .                            for NVIDIA GPUs; without: --build-arg DEVICE=cpu
#   docker run --rm -v "$PWD/outputs:/workspace/outputs" flame_ext ./train.sh [--section.key value ...]
#
# With GPUs: docker run --gpus all --shm-size 16g … . Files in outputs belong to user 1000, or to --build-arg USER_ID.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

ARG DEVICE=cuda
ARG USER_ID=1000

# torch.compile and Triton compile while a job runs; make and git are for "make check". Versions are the base image's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid "$USER_ID" trainer \
    && install --directory --owner=trainer /workspace /workspace/outputs
USER ${USER_ID}
WORKDIR /workspace
ENV VIRTUAL_ENV=/home/trainer/venv
ENV PATH=/home/trainer/venv/bin:$PATH
RUN python3 -m venv "$VIRTUAL_ENV"

# In a layer of its own, since it is the largest one. PyPI's torch for Linux brings CUDA with it.
COPY --chown=trainer .ci/constraints.txt .ci/
RUN case "$DEVICE" in \
        cuda) ;; \
        cpu) export PIP_INDEX_URL=https://download.pytorch.org/whl/cpu ;; \
        *) echo "DEVICE must be cuda or cpu, got '$DEVICE'" >&2; exit 1 ;; \
    esac \
    && pip install --no-cache-dir --constraint .ci/constraints.txt torch

COPY --chown=trainer . .
RUN pip install --no-cache-dir --constraint .ci/constraints.txt --editable '.[dev]'

CMD ["./train.sh"]
