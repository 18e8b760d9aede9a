# syntax=docker/dockerfile:1
# MAPSeg for MONAI: package, bundles and shipped weights. See docs/how-to/container.md.
ARG BASE=ubuntu:24.04
FROM ${BASE}

# where pip finds the PyTorch build that fits the base (https://pytorch.org/get-started/locally names them); empty: its usual index
ARG TORCH_INDEX=

# the base decides the version of Python
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 mapseg

ENV PATH=/opt/mapseg/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HOME=/tmp

WORKDIR /opt/mapseg
# PyTorch first: it is the largest layer and changes least
COPY constraints.txt ./
RUN python3 -m venv venv \
    && pip install ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "$(grep '^torch==' constraints.txt)"
COPY setup.cfg setup.py pyproject.toml README.md LICENSE ./
COPY mapseg_components ./mapseg_components
COPY bundles ./bundles
COPY sample ./sample
RUN pip install -c constraints.txt .

USER 10001
WORKDIR /opt/mapseg/bundles/mapseg_adaptation
# no entry point: mapseg and python -m monai.bundle are both in the path
CMD ["mapseg", "--help"]
