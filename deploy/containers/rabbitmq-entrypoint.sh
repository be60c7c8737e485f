#!/usr/bin/env bash
# What compose.yml relies on of the official image's entrypoint: the server runs as the user rabbitmq, which owns the
# volume. A command beside it (a health check) runs as root, as there.
set -euo pipefail
if [[ $1 == rabbitmq* ]] && [ "$(id -u)" -eq 0 ]; then
    [ "$1" != rabbitmq-server ] || find /var/lib/rabbitmq \! -user rabbitmq -exec chown rabbitmq '{}' +
    exec setpriv --reuid=rabbitmq --regid=rabbitmq --init-groups "$0" "$@"
fi
exec "$@"
