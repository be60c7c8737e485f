-- The outbox: a service inserts an event in the same transaction as its rows, the relay publishes it.
--
-- Everything lives in the schema `outbox`, so that it can be added to any database. The relay reads
-- `outbox.event` by position and never updates or deletes a row of it.

-- Who publishes from this database. One row, written by `outbox-relay migrate --source NAME`.
-- The incarnation is raised after a restore from backup or a failover that lost commits: what was
-- published before may then contradict what is stored now, so every chain of versions begins anew
-- under another name (`person`, then `person~2`). A flag could be forgotten; the database cannot.
CREATE TABLE outbox.source (
    singleton   boolean     PRIMARY KEY DEFAULT true CHECK (singleton),
    name        text        NOT NULL CHECK (name ~ '^[a-z][a-z0-9_-]{0,62}$'),
    incarnation integer     NOT NULL DEFAULT 1 CHECK (incarnation >= 1),
    since       timestamptz NOT NULL DEFAULT now()
);

-- Positions order the events. CACHE 1, because a session that keeps values back would hand out a low
-- position long after higher ones were read.
CREATE SEQUENCE outbox.position AS bigint START 1 CACHE 1 NO CYCLE;

-- The only way to a position. Whoever takes one holds the shared advisory lock (1869968482, 1), the
-- ASCII codes of "outb", until the end of the transaction. So when the relay misses a position, the
-- lock's holders tell it who may still bring it, and when nobody can any more. The lock comes first:
-- the other way round there would be a moment with a position and without a holder.
-- SECURITY DEFINER spares writers every right on the sequence. No search_path is set, which would
-- cost a tenth of the throughput: every name in the body is qualified and it uses no operator.
CREATE FUNCTION outbox.next_position() RETURNS bigint
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER AS $$
BEGIN
    PERFORM pg_catalog.pg_advisory_xact_lock_shared(1869968482, 1);
    RETURN pg_catalog.nextval('outbox.position'::pg_catalog.regclass);
END
$$;

-- A UUID of version 7 (RFC 9562) for clients without one: 48 bits of milliseconds, then random bits.
CREATE FUNCTION outbox.uuid7() RETURNS uuid
    LANGUAGE sql VOLATILE PARALLEL SAFE AS $$
    SELECT encode(
        set_bit(set_bit(
            overlay(uuid_send(gen_random_uuid())
                PLACING substring(int8send((extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3)
                FROM 1 FOR 6),
            52, 1), 53, 1),
        'hex')::uuid
$$;

-- The events, append-only. A plain INSERT without `position` is the contract for every language.
--   version  1, 2, 3, … without holes per aggregate, taken from the aggregate's row under its row
--            lock and before the position; two transactions then cannot invert the two.
--   type     the routing key, which AMQP limits to 255 bytes.
--   payload  json, not jsonb: the bytes are forwarded as they were written.
--   headers  a JSON object of extra AMQP headers (`traceparent`, `baseline`, …), or null.
-- Partitions are ranges of positions, so that history can be retired by TRUNCATE.
CREATE TABLE outbox.event (
    position       bigint      NOT NULL DEFAULT outbox.next_position(),
    id             uuid        NOT NULL DEFAULT outbox.uuid7(),
    aggregate_type text        NOT NULL CHECK (octet_length(aggregate_type) BETWEEN 1 AND 255),
    aggregate_id   text        NOT NULL CHECK (octet_length(aggregate_id) BETWEEN 1 AND 255),
    version        bigint      NOT NULL CHECK (version >= 1),
    type           text        NOT NULL CHECK (octet_length(type) BETWEEN 1 AND 255),
    payload        json        NOT NULL,
    headers        jsonb       CHECK (jsonb_typeof(headers) = 'object'),
    created_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (position)
) PARTITION BY RANGE (position);

-- Finds the stretch of positions in which an event of a known time lies (a UUIDv7 tells its time),
-- and costs next to nothing to maintain.
CREATE INDEX event_created_at ON outbox.event USING brin (created_at);

-- The first million positions.
CREATE TABLE outbox.event_1 PARTITION OF outbox.event FOR VALUES FROM (MINVALUE) TO (1000001);

-- A net for the day on which nobody made the next partition: writers go on, and an alarm is due.
CREATE TABLE outbox.event_default PARTITION OF outbox.event DEFAULT;

-- Refuses a version that was taken twice, and finds one aggregate's events to trace, replay or erase
-- them. Per partition, because a unique index over all would have to contain the position.
CREATE UNIQUE INDEX event_1_aggregate ON outbox.event_1 (aggregate_type, aggregate_id, version);
CREATE UNIQUE INDEX event_default_aggregate ON outbox.event_default (aggregate_type, aggregate_id, version);

-- Where each relay stands: one row per relay name, written a few times a second at most.
-- Settled means: confirmed by the broker, set aside, dropped by policy, or rolled back by its writer.
--   low_water  every position up to here is settled.
--   high       the last position read.
--   open       what lies between and is not settled (a restart reads it again). Beyond a cap the
--              relay stores a lower `high` instead and repeats more after a restart.
--   epoch      raised by every new leader; an old one's writes do not match it and change nothing.
-- The numeric id is the second key of the leader's advisory lock (1869968492, id): two names never
-- share a lock, as hashes of them could. Half-empty pages keep the updates within the page (HOT).
CREATE TABLE outbox.relay (
    id           integer        NOT NULL UNIQUE GENERATED ALWAYS AS IDENTITY,
    name         text           PRIMARY KEY CHECK (name ~ '^[a-z][a-z0-9_-]{0,62}$'),
    low_water    bigint         NOT NULL DEFAULT 0 CHECK (low_water >= 0),
    high         bigint         NOT NULL DEFAULT 0,
    open         int8multirange NOT NULL DEFAULT '{}',
    epoch        bigint         NOT NULL DEFAULT 0,
    leader       text,
    leader_since timestamptz,
    heartbeat_at timestamptz,
    paused_at    timestamptz,
    paused_by    text,
    CHECK (low_water <= high)
) WITH (fillfactor = 50);

-- Copies of events that a relay set aside, so that the rest can go on. A copy, because the relay
-- never writes to `outbox.event`, and because each relay name has its own fate of an event.
CREATE TABLE outbox.parked (
    relay           text        NOT NULL REFERENCES outbox.relay (name),
    position        bigint      NOT NULL,
    id              uuid        NOT NULL,
    aggregate_type  text        NOT NULL,
    aggregate_id    text        NOT NULL,
    version         bigint      NOT NULL,
    type            text        NOT NULL,
    payload         json        NOT NULL,
    headers         jsonb,
    created_at      timestamptz NOT NULL,
    reason          text        NOT NULL CHECK (reason IN ('unroutable', 'refused')),
    detail          text        NOT NULL,
    attempts        integer     NOT NULL DEFAULT 1,
    parked_at       timestamptz NOT NULL DEFAULT now(),
    last_attempt_at timestamptz NOT NULL DEFAULT now(),
    next_attempt_at timestamptz,
    PRIMARY KEY (relay, position)
);
CREATE INDEX parked_due ON outbox.parked (relay, next_attempt_at) WHERE next_attempt_at IS NOT NULL;
CREATE INDEX parked_aggregate ON outbox.parked (aggregate_type, aggregate_id);

-- What a writer needs and no more: every column but `position`, and no right on the sequence, so that
-- the default is the only way to a position. RETURNING position is allowed.
CREATE FUNCTION outbox.grant_writer(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA outbox TO %s', role);
    EXECUTE format('GRANT SELECT ON outbox.source, outbox.migration TO %s', role);
    EXECUTE format('GRANT SELECT (position), INSERT (id, aggregate_type, aggregate_id, version, type,'
                   ' payload, headers, created_at) ON outbox.event TO %s', role);
END
$$;

-- What a relay needs and no more: it reads events and the sequence's mark, and writes only its own
-- tables. Give the role `pg_read_all_stats` too: without it the relay cannot see that a transaction
-- sleeps, and takes an idle one for a possible writer of every position it misses.
CREATE FUNCTION outbox.grant_relay(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA outbox TO %s', role);
    EXECUTE format('GRANT SELECT ON outbox.source, outbox.migration, outbox.event, outbox.position TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE ON outbox.relay TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON outbox.parked TO %s', role);
END
$$;
