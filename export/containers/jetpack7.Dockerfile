# cobra_edge on JetPack 7: Ubuntu 24.04, Python 3.12, CUDA 13. The base is NVIDIA's image for ARM servers (SBSA).
# JetPack 7.2 (Orin, Thor) uses the base below, which has TensorRT 10.16; for 7.0 and 7.1 (Thor) add
#   --build-arg BASE=nvcr.io/nvidia/tensorrt:25.08-py3
# On the Jetson, from the root of the repository:
#   docker build -f export/containers/jetpack7.Dockerfile -t cobra-edge:jetpack7 .
ARG BASE=nvcr.io/nvidia/tensorrt:26.05-py3

FROM ${BASE} AS wheel
ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential cmake python3-pip python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY CMakeLists.txt LICENSE README.md pyproject.toml ./
COPY constraints constraints
COPY cobra_edge cobra_edge
COPY export export
COPY runtimes runtimes
# A new pip: the system's is too old for some wheel tags, and for --build-constraint.
RUN python3 -m venv /build \
 && /build/bin/pip install --constraint constraints/jetpack7.txt pip \
 && /build/bin/pip wheel --no-deps --build-constraint constraints/build.txt --wheel-dir /wheels .

FROM ${BASE}
ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/*
# Fail at build time for another Python, or a base without TensorRT's Python module.
RUN python3 -c "import sys, importlib.util as u; assert sys.version_info[:2] == (3, 12), sys.version; assert u.find_spec('tensorrt')"
COPY --from=wheel /wheels /wheels
COPY constraints/jetpack7.txt /wheels/constraints.txt
# --system-site-packages: TensorRT's module is a system package.
RUN python3 -m venv --system-site-packages /opt/cobra-edge \
 && /opt/cobra-edge/bin/pip install --no-cache-dir --constraint /wheels/constraints.txt pip \
 && /opt/cobra-edge/bin/pip install --no-cache-dir --constraint /wheels/constraints.txt "$(ls /wheels/*.whl)[jetpack7,serve]"
# Fail at build time without what the GPU decoder needs: the driver's Python bindings and the compiled kernels. The driver itself
# comes with --runtime nvidia, so --device auto finds the GPU when the container runs.
RUN /opt/cobra-edge/bin/python -c "import cuda.bindings.driver; from cobra_edge.decode.cuda.library import read_kernels; read_kernels()"
# Telemetry of onnxruntime. The package disables it too, before it imports onnxruntime.
ENV ORT_DISABLE_TELEMETRY=1
# TensorRT engines are cached here: mount a volume, or each new container builds them again.
ENV XDG_CACHE_HOME=/cache
VOLUME /cache
# For `serve --state-dir /state`: cached image states survive a restart.
VOLUME /state
EXPOSE 8000
ENTRYPOINT ["/opt/cobra-edge/bin/cobra-edge"]
CMD ["--help"]
