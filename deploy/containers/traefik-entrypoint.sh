#!/bin/sh
set -e
# As the official image's: options alone are Traefik's.
[ "${1#-}" = "$1" ] || set -- traefik "$@"
exec "$@"
