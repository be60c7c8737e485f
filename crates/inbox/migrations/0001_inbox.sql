-- The inbox: what a consumer has applied, what waits, and what was no event.
--
-- It is written in the transaction of the read model, so that an event takes effect once. `consumer`
-- is part of every key: two consumers in one database must not deduplicate each other's events.
-- `source` is the publisher's name with its incarnation (`person`, `person~2`), from AMQP's app_id.

-- The last version applied, one row per aggregate. It never expires, so neither does deduplication.
-- Version 0 stands for an aggregate of which nothing has been applied: the row is there to be locked.
CREATE TABLE inbox.aggregate (
    consumer       text        NOT NULL,
    source         text        NOT NULL,
    aggregate_type text        NOT NULL,
    aggregate_id   text        NOT NULL,
    version        bigint      NOT NULL DEFAULT 0 CHECK (version >= 0),
    last_event_id  uuid,
    updated_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, source, aggregate_type, aggregate_id),
    CHECK ((version = 0) = (last_event_id IS NULL))
) WITH (fillfactor = 80);

-- Events that wait for their turn.
--   gap     an earlier version has not arrived.
--   poison  the handler refused it: `error` says why, `attempts` how often.
--   behind  an earlier version of the aggregate is poison.
-- Bodies are bytea, because jsonb refuses "\u0000" and a held event must be kept as it came.
CREATE TABLE inbox.held (
    consumer       text        NOT NULL,
    source         text        NOT NULL,
    aggregate_type text        NOT NULL,
    aggregate_id   text        NOT NULL,
    version        bigint      NOT NULL CHECK (version >= 1),
    event_id       uuid        NOT NULL,
    type           text        NOT NULL,
    occurred_at    timestamptz,
    headers        json        NOT NULL,
    payload        bytea       NOT NULL,
    reason         text        NOT NULL CHECK (reason IN ('gap', 'poison', 'behind')),
    error          text,
    attempts       integer     NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    first_at       timestamptz NOT NULL DEFAULT now(),
    last_at        timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, source, aggregate_type, aggregate_id, version),
    CHECK ((reason = 'poison') = (error IS NOT NULL))
);
-- For lists and alarms: the oldest first, by reason.
CREATE INDEX held_reason ON inbox.held (consumer, reason, first_at);

-- Messages that cannot be applied at all, kept as they came.
--   malformed  not an event: a property or header that every event carries is missing or wrong.
--   fork       an event that contradicts one already applied at its version: the source's history
--              was rewritten (a restore, a failover that lost commits) without a new incarnation.
-- A redelivery finds the digest (SHA-256 of reason, message id, routing key and body) and is counted.
CREATE TABLE inbox.rejected (
    id          bigint      PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    consumer    text        NOT NULL,
    digest      bytea       NOT NULL,
    reason      text        NOT NULL CHECK (reason IN ('malformed', 'fork')),
    detail      text        NOT NULL,
    routing_key text        NOT NULL,
    properties  json        NOT NULL,
    body        bytea       NOT NULL,
    times       bigint      NOT NULL DEFAULT 1,
    first_at    timestamptz NOT NULL DEFAULT now(),
    last_at     timestamptz NOT NULL DEFAULT now(),
    UNIQUE (consumer, digest)
);

-- What a consumer needs and no more.
CREATE FUNCTION inbox.grant_consumer(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA inbox TO %s', role);
    EXECUTE format('GRANT SELECT ON inbox.migration TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON inbox.aggregate, inbox.held, inbox.rejected TO %s', role);
END
$$;
