#!/usr/bin/env bash
# A RabbitMQ user for one program, with the rights that it needs and no more. Where rabbitmqctl can reach the
# broker:
#
#   deploy/permissions/rabbitmq.sh VIRTUAL-HOST USER relay            < FILE-WITH-THE-PASSWORD
#   deploy/permissions/rabbitmq.sh VIRTUAL-HOST USER declaring-relay  < FILE-WITH-THE-PASSWORD
#   deploy/permissions/rabbitmq.sh VIRTUAL-HOST USER subscriber QUEUE < FILE-WITH-THE-PASSWORD
#   deploy/permissions/rabbitmq.sh VIRTUAL-HOST USER replay QUEUE     < FILE-WITH-THE-PASSWORD
#   deploy/permissions/rabbitmq.sh VIRTUAL-HOST USER monitor          < FILE-WITH-THE-PASSWORD
#
# relay       may write to the exchange event_dispatcher, which is there already.
# declaring-relay
#             may also declare it, with event_dispatcher.by_aggregate: for a relay with --declare-exchange.
# subscriber  may declare both exchanges, and declare, bind and consume QUEUE and every queue whose name begins
#             with "QUEUE.", such as its dead letters.
# replay      may publish history to event_dispatcher, or to QUEUE and what begins with "QUEUE." alone.
# monitor     may read queues and bindings in the management API, and nothing else: for MANAGEMENT_URL.
#
# Give each relay a user of its own: subscribers know by it who publishes (`--source person=USER`). Without a
# program it is a relay. Run it again to set the password and the rights anew. A monitor has the tag management;
# the others have no tags, and any that the user has are taken away. The files beside this one hold the three patterns: configure, write, read.
set -euo pipefail

usage() {
    echo "usage: $0 VIRTUAL-HOST USER [relay | declaring-relay | subscriber QUEUE | replay QUEUE | monitor] < FILE-WITH-THE-PASSWORD" >&2
    exit 2
}
[ $# -ge 2 ] || usage
vhost=$1 user=$2 program=${3:-relay} queue=${4-}
case $program in
relay | declaring-relay | monitor) [ $# -le 3 ] || usage ;;
subscriber | replay) [ $# -eq 4 ] && [ -n "$queue" ] || usage ;;
*) usage ;;
esac

# The name becomes part of a pattern, in which it has to mean itself. No backslashes: Debian's wrapper of rabbitmqctl
# hands its arguments to another shell.
case $queue in
*[!A-Za-z0-9._:-]*)
    echo "$0: in the name of a queue only letters, digits, '.', '_', ':' and '-'; set other rights by hand" >&2
    exit 2
    ;;
esac
quoted=${queue//./[.]}
mapfile -t rights < "$(dirname "$0")/$program"
rights=("${rights[@]//QUEUE/$quoted}")

IFS= read -r password || [ -n "$password" ] || {
    echo "$0: the password is read from the standard input, which is empty" >&2
    exit 2
}

# rabbitmqctl reads the password from its standard input, so no list of processes shows it. From 4.0 on it opens
# its standard input only for these commands with exactly this many arguments: no option may stand beside them.
if rabbitmqctl -q list_users | cut -f1 | grep -qxF -e "$user"; then
    printf '%s' "$password" | rabbitmqctl change_password "$user" > /dev/null
else
    printf '%s' "$password" | rabbitmqctl add_user "$user" > /dev/null
fi
# Who has the tag administrator, policymaker or impersonator can publish under the name of any other user.
tags=()
[ "$program" != monitor ] || tags=(management)
rabbitmqctl -q set_user_tags "$user" "${tags[@]}"
rabbitmqctl -q set_permissions -p "$vhost" "$user" "${rights[@]}"
