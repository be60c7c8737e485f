#!/usr/bin/env bash
# A RabbitMQ user for a relay: it may write to the exchange event_dispatcher and do nothing else (the
# exchange is there already; who has it declared by --declare-exchange lets it configure it as well).
# Where rabbitmqctl can reach the broker:
#
#   deploy/permissions/rabbitmq.sh VIRTUAL-HOST USER < FILE-WITH-THE-PASSWORD
#
# Again sets the password and the rights anew. The file `relay` beside this one holds the three patterns:
# configure, write, read.
set -euo pipefail
[ $# -eq 2 ] || {
    echo "usage: $0 VIRTUAL-HOST USER < FILE-WITH-THE-PASSWORD" >&2
    exit 2
}
vhost=$1 user=$2
mapfile -t rights < "$(dirname "$0")/relay"
IFS= read -r password || [ -n "$password" ]

# rabbitmqctl takes the password from its standard input, where no list of processes shows it.
if rabbitmqctl -q list_users | cut -f1 | grep -qxF "$user"; then
    printf '%s' "$password" | rabbitmqctl -q change_password "$user"
else
    printf '%s' "$password" | rabbitmqctl -q add_user "$user"
fi
rabbitmqctl -q set_permissions -p "$vhost" "$user" "${rights[@]}"
