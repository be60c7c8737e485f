#!/usr/bin/env bash
# What compose.yml relies on of the official image's entrypoint: an empty volume is initialised with the password and
# the database, by a server that listens on its socket alone, and /docker-entrypoint-initdb.d is run.
set -euo pipefail
if [ "$1" = postgres ] && [ "$(id -u)" -eq 0 ]; then
    mkdir -p "$PGDATA"
    chmod 700 "$PGDATA"
    chown -R postgres:postgres "$PGDATA" /var/run/postgresql
    exec setpriv --reuid=postgres --regid=postgres --init-groups "$0" "$@"
fi
if [ "$1" = postgres ] && [ ! -s "$PGDATA/PG_VERSION" ]; then
    export POSTGRES_USER=${POSTGRES_USER:-postgres}
    export POSTGRES_DB=${POSTGRES_DB:-$POSTGRES_USER}
    initdb --username="$POSTGRES_USER" --pwfile=<(printf '%s\n' "${POSTGRES_PASSWORD:?}")
    printf '\nhost all all all scram-sha-256\n' >>"$PGDATA/pg_hba.conf"
    pg_ctl --pgdata="$PGDATA" --options="-c listen_addresses=''" --wait start
    export PGPASSWORD=$POSTGRES_PASSWORD
    [ "$POSTGRES_DB" = postgres ] || createdb --username="$POSTGRES_USER" "$POSTGRES_DB"
    for file in /docker-entrypoint-initdb.d/*; do
        case $file in
            # As there: one that is not executable is sourced.
            *.sh) if [ -x "$file" ]; then "$file"; else . "$file"; fi ;;
            *.sql) psql --set=ON_ERROR_STOP=1 --no-psqlrc --username="$POSTGRES_USER" --dbname="$POSTGRES_DB" --file="$file" ;;
        esac
    done
    unset PGPASSWORD
    pg_ctl --pgdata="$PGDATA" --mode=fast --wait stop
fi
exec "$@"
