# Stand-ins for the official images, for `make test-containers` where none can be pulled: of Debian packages, with
# what compose.yml and deploy/Dockerfile rely on: programs, users, variables, volumes and entrypoints.

FROM debian:12.12-slim AS rust
RUN apt-get update && apt-get install --yes --no-install-recommends ca-certificates gcc libc6-dev wget \
    && rm -rf /var/lib/apt/lists/*
COPY --from=toolchain bin /usr/local/rustup/toolchains/own/bin
COPY --from=toolchain lib /usr/local/rustup/toolchains/own/lib
COPY --from=host ca-certificates.crt /etc/ssl/certs/
COPY --from=host config.toml /usr/local/cargo/
# As in Cargo.toml, or less where a quick build is asked for.
ARG OPT_LEVEL=3
ARG LTO=thin
ENV CARGO_PROFILE_RELEASE_OPT_LEVEL=$OPT_LEVEL CARGO_PROFILE_RELEASE_LTO=$LTO
ENV RUSTUP_HOME=/usr/local/rustup CARGO_HOME=/usr/local/cargo \
    PATH=/usr/local/cargo/bin:/usr/local/rustup/toolchains/own/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
CMD ["bash"]

# A mirror of sid may be older than its Release file allows.
FROM debian:sid-slim AS sid
RUN echo 'Acquire::Check-Valid-Until "false";' > /etc/apt/apt.conf.d/90mirror

FROM sid AS postgres
RUN groupadd --system --gid 999 postgres \
    && useradd --system --gid 999 --uid 999 --home-dir /var/lib/postgresql --shell /bin/bash postgres \
    && apt-get update \
    && apt-get install --yes --no-install-recommends postgresql-common \
    && echo 'create_main_cluster = false' > /etc/postgresql-common/createcluster.conf \
    && apt-get install --yes --no-install-recommends postgresql-18 \
    && rm -rf /var/lib/apt/lists/* \
    && sed -i "s/^#listen_addresses = .*/listen_addresses = '*'/" /usr/share/postgresql/18/postgresql.conf.sample \
    && mkdir -p /docker-entrypoint-initdb.d /var/lib/postgresql \
    && install -d -m 3777 -o postgres -g postgres /var/run/postgresql \
    && chown postgres:postgres /var/lib/postgresql && chmod 1777 /var/lib/postgresql
COPY --chmod=755 postgres-entrypoint.sh /usr/local/bin/docker-entrypoint.sh
# UTF-8, as there: it becomes the encoding of the databases.
ENV LANG=C.UTF-8 PG_MAJOR=18 PGDATA=/var/lib/postgresql/18/docker \
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/postgresql/18/bin
VOLUME /var/lib/postgresql
STOPSIGNAL SIGINT
ENTRYPOINT ["docker-entrypoint.sh"]
CMD ["postgres"]

FROM sid AS rabbitmq
RUN groupadd --system --gid 999 rabbitmq \
    && useradd --system --gid 999 --uid 999 --home-dir /var/lib/rabbitmq rabbitmq \
    && printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d && chmod 755 /usr/sbin/policy-rc.d \
    && apt-get update && apt-get install --yes --no-install-recommends rabbitmq-server \
    && rm -rf /var/lib/apt/lists/* /var/lib/rabbitmq/.erlang.cookie \
    && ln -s /usr/lib/rabbitmq/bin/* /usr/local/bin/ \
    && mkdir -p /etc/rabbitmq/conf.d \
    && printf 'loopback_users.guest = false\nlog.console = true\n' > /etc/rabbitmq/conf.d/10-defaults.conf \
    && echo '[rabbitmq_management,rabbitmq_prometheus].' > /etc/rabbitmq/enabled_plugins \
    && chown -R rabbitmq:rabbitmq /var/lib/rabbitmq /etc/rabbitmq /var/log/rabbitmq && chmod 777 /var/lib/rabbitmq
COPY --chmod=755 rabbitmq-entrypoint.sh /usr/local/bin/docker-entrypoint.sh
ENV HOME=/var/lib/rabbitmq RABBITMQ_DATA_DIR=/var/lib/rabbitmq LANG=C.UTF-8
VOLUME /var/lib/rabbitmq
ENTRYPOINT ["docker-entrypoint.sh"]
CMD ["rabbitmq-server"]

FROM debian:12.12-slim AS traefik
COPY --from=binaries traefik /usr/local/bin/
COPY --chmod=755 traefik-entrypoint.sh /entrypoint.sh
ENTRYPOINT ["/entrypoint.sh"]
CMD ["traefik"]
