# syntax=docker/dockerfile:1
# The aggregator. TORCH_OPTIONS says where pip finds the build of torch that fits the machines: its CPU build for
# images of a few hundred megabytes, a CUDA build for GPUs.
#   docker buildx build -f deploy/images/aggregator.Dockerfile --sbom=true .
ARG PYTHON=3.11-slim-bookworm
FROM python:${PYTHON} AS build
ARG TORCH=torch==2.13.0
ARG TORCH_OPTIONS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/fedtide
RUN /opt/fedtide/bin/pip install ${TORCH_OPTIONS} "${TORCH}"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY fedtide fedtide
COPY fabric fabric
COPY edge_agent edge_agent
COPY coordinator coordinator
COPY aggregation aggregation
COPY console console
RUN /opt/fedtide/bin/pip install ".[aggregator,privacy]" \
 && /opt/fedtide/bin/pip uninstall --yes pip

FROM python:${PYTHON}
ARG VERSION=0.2.0
LABEL org.opencontainers.image.title="fedtide aggregator" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN pip uninstall --yes pip setuptools wheel || true
COPY --from=build /opt/fedtide /opt/fedtide
ENV PATH=/opt/fedtide/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
ENTRYPOINT ["python", "-m", "fedtide.aggregation"]
