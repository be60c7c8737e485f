-- Requests of operators to a subscriber.
--
-- Only a subscriber's own handler can apply an event. So a program without the handler, such as the console, writes down
-- what it asks for, and the subscriber's processes work it off. A row is a request and what came of it; it stays.
--
--   operator, why         who asks, and why. Kept for good, so they name no other person.
--   aggregate_type, ...   which held events: all conditions that are not null must match.
--   dry_run               the handler is called, and everything it did is rolled back.
--   stop                  the operator asks for the end. What was applied by then is kept.
--   taken_at, heartbeat_at, taken_by   a process works it off. One that is silent for a minute has died, and another one
--                         begins again: what was applied is not held any more.
--   aggregates, ...       what came of it so far: aggregates tried, events applied, aggregates that an event stops again,
--                         and events of these aggregates that are still held.
--   errors                how many aggregates each error stops, a JSON object; a hundred errors at most.
--   outcome               once it has ended: `done`, `stopped`, or `failed`, with the failure.
CREATE TABLE inbox.request (
    id             bigint      PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    consumer       text        NOT NULL,
    operator       text        NOT NULL CHECK (length(operator) BETWEEN 1 AND 200),
    why            text        NOT NULL CHECK (length(why) BETWEEN 1 AND 1000),
    db_role        text        NOT NULL DEFAULT session_user,
    aggregate_type text,
    aggregate_id   text,
    reason         text,
    error          text,
    dry_run        boolean     NOT NULL DEFAULT false,
    asked_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    stop           boolean     NOT NULL DEFAULT false,
    taken_at       timestamptz,
    taken_by       text,
    heartbeat_at   timestamptz,
    ended_at       timestamptz,
    aggregates     bigint      NOT NULL DEFAULT 0,
    applied        bigint      NOT NULL DEFAULT 0,
    refused        bigint      NOT NULL DEFAULT 0,
    held           bigint      NOT NULL DEFAULT 0,
    errors         jsonb       NOT NULL DEFAULT '{}',
    outcome        text        CHECK (outcome IN ('done', 'stopped', 'failed')),
    failure        text,
    CHECK ((aggregate_type IS NULL) = (aggregate_id IS NULL)),
    CHECK ((ended_at IS NULL) = (outcome IS NULL)),
    CHECK ((outcome = 'failed') = (failure IS NOT NULL))
);
-- The server keeps no samples of what people wrote, and of which aggregates it was.
ALTER TABLE inbox.request
    ALTER COLUMN operator SET STATISTICS 0, ALTER COLUMN why SET STATISTICS 0,
    ALTER COLUMN aggregate_id SET STATISTICS 0, ALTER COLUMN error SET STATISTICS 0,
    ALTER COLUMN errors SET STATISTICS 0, ALTER COLUMN failure SET STATISTICS 0;
COMMENT ON TABLE inbox.request IS
    'A row: what an operator asked a consumer for, and what came of it.';

-- What is still to be done: nearly always nothing.
CREATE INDEX request_open ON inbox.request (consumer, id) WHERE ended_at IS NULL;

-- What a consumer needs, as before, and to work requests off.
CREATE OR REPLACE FUNCTION inbox.grant_consumer(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA inbox TO %s', role);
    EXECUTE format('GRANT SELECT ON inbox.migration, inbox.earlier_source, inbox.left_behind TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON inbox.aggregate, inbox.held, inbox.rejected, inbox.erasure'
                   ' TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE ON inbox.source TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT ON inbox.skipped TO %s', role);
    EXECUTE format('GRANT SELECT, UPDATE (taken_at, taken_by, heartbeat_at, ended_at, aggregates, applied, refused, held,'
                   ' errors, outcome, failure) ON inbox.request TO %s', role);
END
$$;

-- What an operator's role needs to look at an inbox and to ask for something. No bodies, no headers.
CREATE FUNCTION inbox.grant_operator(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    PERFORM inbox.grant_reader(role);
    EXECUTE format('GRANT SELECT (consumer, source, aggregate_type, aggregate_id, version, event_id, type, reason, error,'
                   ' attempts, first_at, last_at) ON inbox.held TO %s', role);
    EXECUTE format('GRANT SELECT (id, consumer, reason, detail, routing_key, times, first_at, last_at)'
                   ' ON inbox.rejected TO %s', role);
    EXECUTE format('GRANT SELECT ON inbox.skipped TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT (consumer, operator, why, aggregate_type, aggregate_id, reason, error, dry_run),'
                   ' UPDATE (stop) ON inbox.request TO %s', role);
END
$$;
COMMENT ON FUNCTION inbox.grant_operator(regrole) IS
    'Lets a role look at the inbox and ask its consumers for something, without bodies.';

-- A role that consumes already keeps doing so.
SELECT inbox.grant_consumer(r.grantee::regrole)
FROM pg_class c, aclexplode(c.relacl) r
WHERE c.oid = 'inbox.held'::regclass AND r.privilege_type = 'INSERT' AND r.grantee <> c.relowner;
