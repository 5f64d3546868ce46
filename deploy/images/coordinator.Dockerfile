# syntax=docker/dockerfile:1
# The coordinator, its CLI, and the hook that makes an installation's Secrets.
#   docker buildx build --platform linux/amd64,linux/arm64 -f deploy/images/coordinator.Dockerfile --sbom=true .
ARG PYTHON=3.11-slim-bookworm
FROM python:${PYTHON} AS build
ARG EXTRAS=control,cluster,tracking,traces,backup
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/fedtide
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY fedtide fedtide
COPY fabric fabric
COPY edge_agent edge_agent
COPY coordinator coordinator
COPY aggregation aggregation
COPY console console
RUN /opt/fedtide/bin/pip install ".[${EXTRAS}]" \
 && /opt/fedtide/bin/pip uninstall --yes pip

FROM python:${PYTHON}
ARG VERSION=0.2.0
LABEL org.opencontainers.image.title="fedtide coordinator" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN pip uninstall --yes pip setuptools wheel || true
COPY --from=build /opt/fedtide /opt/fedtide
ENV PATH=/opt/fedtide/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
ENTRYPOINT ["python", "-m", "fedtide.coordinator"]
