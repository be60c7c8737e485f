-- The two roles around an outbox, with what they need and no more: a writer appends events, a relay
-- publishes them. In the database whose outbox is installed, as a superuser; again does no harm:
--
--   psql "$DATABASE_URL" -v writer=person_api -v relay=outbox_relay -f deploy/permissions/roles.sql
--
-- A new role has no password yet. `\password person_api` in psql sets one that no log and no history sees.
SELECT set_config('roles.writer', :'writer', false), set_config('roles.relay', :'relay', false);

DO $$
DECLARE
    writer text := current_setting('roles.writer');
    relay  text := current_setting('roles.relay');
    role   text;
BEGIN
    FOREACH role IN ARRAY ARRAY[writer, relay] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = role) THEN
            EXECUTE format('CREATE ROLE %I LOGIN', role);
        END IF;
    END LOOP;
    PERFORM outbox.grant_writer(quote_ident(writer)::regrole), outbox.grant_relay(quote_ident(relay)::regrole);
    -- To see who sleeps in a transaction: otherwise every idle one that has appended counts as a
    -- possible writer of whatever is missing.
    EXECUTE format('GRANT pg_read_all_stats TO %I', relay);
END
$$;
