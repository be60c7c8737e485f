#!/usr/bin/env bash
# The programs' users of RabbitMQ in containers, as deploy/permissions/rabbitmq.sh makes them. Run by compose.yml
# against the node that RABBITMQ_NODENAME names, in its virtual host "/"; the passwords come from the environment.
set -euo pipefail
user() { printf '%s' "$1" | bash /permissions/rabbitmq.sh / "${@:2}"; }
user "$OUTBOX_RELAY_PERSON_PASSWORD" outbox_relay_person relay
user "$OUTBOX_RELAY_SCORE_PASSWORD" outbox_relay_score relay
user "$SCORE_PROJECTOR_PASSWORD" score_projector subscriber score
user "$OUTBOX_REPLAY_PASSWORD" outbox_replay replay score
