-- What operators see of a relay, and replays.

-- What the leader waits for, as it would say at /ready: [{"part", "reason", "seconds"}], empty when it
-- waits for nothing. Written with the heartbeat, so that anybody who can read the database can tell
-- without reaching the process.
ALTER TABLE outbox.relay ADD COLUMN waiting jsonb NOT NULL DEFAULT '[]';

-- Replays that run: history is published again, beside the live relay. A row here keeps retention away
-- from what is still to be read. It is deleted at the replay's end; one whose heartbeat is more than a
-- minute old belongs to a replay that died, and keeps nothing.
--   next_position  everything below was replayed.
--   to_position    the last position to replay.
--   target         where to: the exchange, or one queue.
CREATE TABLE outbox.replay (
    id            uuid        PRIMARY KEY DEFAULT outbox.uuid7(),
    next_position bigint      NOT NULL,
    to_position   bigint      NOT NULL,
    target        text        NOT NULL,
    started_by    text        NOT NULL,
    started_at    timestamptz NOT NULL DEFAULT now(),
    heartbeat_at  timestamptz NOT NULL DEFAULT now()
);

-- What a relay, and whoever operates it, needs and no more: the rights of before, and replays.
CREATE OR REPLACE FUNCTION outbox.grant_relay(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA outbox TO %s', role);
    EXECUTE format('GRANT SELECT ON outbox.source, outbox.migration, outbox.event, outbox.position TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE ON outbox.relay TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON outbox.parked, outbox.replay TO %s', role);
END
$$;
