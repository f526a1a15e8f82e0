# CPU:   docker build -t maml .
# CUDA:  docker build -t maml --build-arg DEVICE=cuda .          (run it with --gpus all)
# Run:   docker run --rm -v "$PWD/outputs:/maml/outputs" -v "$PWD/data:/data" maml experiment=finn2017/omniglot_5way_1shot_mlp
FROM python:3.12-slim

# The pinned stack first: a change of the code does not install it again.
ARG DEVICE=cpu
COPY docker/${DEVICE}.lock /tmp/requirements.lock
RUN pip install --no-cache-dir --require-hashes -r /tmp/requirements.lock && rm /tmp/requirements.lock

COPY pyproject.toml README.md /src/
COPY maml /src/maml
COPY experiments /src/experiments
COPY conf /src/conf
RUN pip install --no-cache-dir --no-deps /src && rm -r /src

# Not root; the directories are open, so that --user $(id -u) can write to what is mounted there.
RUN useradd --create-home --uid 1000 maml \
    && mkdir -p /maml/outputs /maml/multirun /data /cache \
    && chmod 777 /maml /maml/outputs /maml/multirun /data /cache
ENV TFDS_DATA_DIR=/data MAML_CACHE=/cache MPLCONFIGDIR=/cache/matplotlib HOME=/home/maml
USER maml
WORKDIR /maml
VOLUME ["/maml/outputs", "/maml/multirun", "/data"]
ENTRYPOINT ["python", "-m", "experiments.run"]
