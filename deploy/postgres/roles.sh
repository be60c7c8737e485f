#!/bin/sh
# Creates the programs' login roles, or gives them their passwords again. What each may do is granted by the
# migrations (`migrate --grant-…`), which is what deploy/permissions/roles.sql grants where there are schemas
# already; here they only get in. LOGIN_ROLES lists them; the password of `score_api` is in
# SCORE_API_PASSWORD, and so on. The server is the one that PGHOST and the like name.
set -e
for role in $LOGIN_ROLES; do
    variable=$(echo "$role" | tr '[:lower:]' '[:upper:]')_PASSWORD
    eval "password=\${$variable:?}"
    PASSWORD=$password psql --no-psqlrc --quiet --single-transaction --set=ON_ERROR_STOP=1 --set=role="$role" <<'SQL'
\getenv password PASSWORD
SELECT current_database() AS database \gset
REVOKE CONNECT, TEMPORARY ON DATABASE :"database" FROM PUBLIC;
REVOKE EXECUTE ON FUNCTION lo_creat(integer), lo_create(oid), lo_from_bytea(oid, bytea) FROM PUBLIC;
-- Whoever may take any advisory lock may stop every writer. The owner, who migrates, is a superuser here.
SELECT format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', p.oid::regprocedure) FROM pg_proc p
WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.proname ~ '^pg_(try_)?advisory' \gexec
-- What is personal must not get into the server's log: what is given to a statement, messages, details and statements
-- of errors, plans. As in deploy/permissions/roles.sql, which says more.
SELECT format('CREATE ROLE %I', :'role') WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'role') \gexec
ALTER ROLE :"role" LOGIN PASSWORD :'password';
ALTER ROLE :"role" SET log_parameter_max_length = 0;
ALTER ROLE :"role" SET log_parameter_max_length_on_error = 0;
ALTER ROLE :"role" SET log_min_messages = log;
ALTER ROLE :"role" SET log_error_verbosity = terse;
ALTER ROLE :"role" SET log_min_error_statement = panic;
ALTER ROLE :"role" SET auto_explain.log_min_duration = -1;
GRANT CONNECT ON DATABASE :"database" TO :"role";
SQL
done
