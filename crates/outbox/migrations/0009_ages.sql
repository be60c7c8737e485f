-- How old a partition is, for retention, is what the server saw, never what a writer says: one imported event of 2019
-- at a partition's end would retire it with a day's events.
SET LOCAL lock_timeout = '2s';

-- Since when a partition is full: since then, at the latest, no writer takes a position of it. Of one that was full
-- before this was kept, that is unknown, so it counts from the first look: it is kept longer than was asked for, and not
-- less long.
--   last_position  the last position that may have an event in it. The net, outbox.event_default, has no end, and
--                  counts anew whenever it has got an event more.
--   full_since     when outbox.why_kept first saw that it was handed out.
CREATE TABLE outbox.partition_age (
    name          text        PRIMARY KEY,
    last_position bigint      NOT NULL,
    full_since    timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- What became of events that were settled without a confirm, so that it can be told of each: the newest ranges of them.
--   told_from        up to here it is not known what became of an event: the relay began above it, or kept no such
--                    ranges then.
--   dropped_by_hand  given up by an operator.
--   dropped_by_rule  no queue took them, and a rule of the relay let them go.
ALTER TABLE outbox.relay
    ADD COLUMN told_from       bigint         NOT NULL DEFAULT 0,
    ADD COLUMN dropped_by_hand int8multirange NOT NULL DEFAULT '{}',
    ADD COLUMN dropped_by_rule int8multirange NOT NULL DEFAULT '{}';
UPDATE outbox.relay SET told_from = high;

-- Why a partition's events may not be retired yet, in words; null when they may. They may when
--   all positions were handed out, and every relay name has settled them;
--   no event of it is set aside or waits, and no running replay still wants it (one that has said nothing for a
--   minute is dead);
--   it was full before `older_than`, as outbox.partition_age has it, where this notes it at its first look;
--   of each aggregate in it there is a baseline or its deletion above it, so that whoever begins later
--   still learns the state: unless `without_baseline` gives that up.
-- The last rule reads the partition's index once, and a few rows above it per aggregate, by index.
CREATE OR REPLACE FUNCTION outbox.why_kept(partition text, older_than timestamptz, without_baseline boolean) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '100ms' AS $$
DECLARE
    bounds   record;
    from_pos bigint;
    to_pos   bigint;
    mark     bigint;
    since    timestamptz;
    blocker  record;
BEGIN
    SELECT * INTO bounds FROM outbox.partition p WHERE p.name = why_kept.partition;
    IF NOT FOUND THEN
        RETURN format('there is no partition %s', partition);
    END IF;
    IF bounds.is_default THEN
        SELECT min(e.position), max(e.position) INTO from_pos, to_pos FROM outbox.event_default e;
    ELSE
        from_pos := coalesce(bounds.lower, 0);
        to_pos := bounds.upper - 1;
    END IF;
    IF to_pos IS NULL THEN
        RETURN 'it is empty';
    END IF;
    SELECT CASE WHEN p.is_called THEN p.last_value ELSE p.last_value - 1 END INTO mark FROM outbox.position p;
    IF mark < to_pos THEN
        RETURN format('writers still fill it: its positions end with %s, and %s was the last one handed out',
                      to_pos, mark);
    END IF;
    INSERT INTO outbox.partition_age AS a (name, last_position) VALUES (partition, to_pos)
    ON CONFLICT (name) DO UPDATE SET last_position = excluded.last_position, full_since = clock_timestamp()
    WHERE a.last_position <> excluded.last_position;
    SELECT r.name, r.low_water, r.heartbeat_at INTO blocker FROM outbox.relay r ORDER BY r.low_water LIMIT 1;
    IF NOT FOUND THEN
        RETURN 'no relay has read it';
    ELSIF blocker.low_water < to_pos THEN
        RETURN format('the relay %s has settled everything only up to position %s, and this one ends with %s; %s',
                      blocker.name, blocker.low_water, to_pos,
                      coalesce('its last heartbeat was of ' || to_char(blocker.heartbeat_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI "UTC"'),
                               'it has never run'));
    END IF;
    SELECT count(*) AS events, min(k.relay) AS relay INTO blocker
    FROM outbox.parked k WHERE k.position BETWEEN from_pos AND to_pos;
    IF blocker.events > 0 THEN
        RETURN format('%s of its events are set aside (relay %s)', blocker.events, blocker.relay);
    END IF;
    SELECT r.id, r.started_by INTO blocker FROM outbox.replay r
    WHERE r.next_position <= to_pos AND r.to_position >= from_pos
      AND r.heartbeat_at > clock_timestamp() - interval '1 minute' LIMIT 1;
    IF FOUND THEN
        RETURN format('the replay %s of %s still reads it', blocker.id, blocker.started_by);
    END IF;
    IF NOT EXISTS (SELECT FROM outbox.event e WHERE e.position BETWEEN from_pos AND to_pos) THEN
        RETURN 'it is empty';
    END IF;
    SELECT a.full_since INTO since FROM outbox.partition_age a WHERE a.name = partition;
    IF since >= older_than THEN
        RETURN format('it is full only since %s',
                      to_char(since AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI "UTC"'));
    END IF;
    IF NOT without_baseline THEN
        SELECT a.aggregate_type, a.aggregate_id INTO blocker
        FROM (SELECT DISTINCT e.aggregate_type, e.aggregate_id FROM outbox.event e
              WHERE e.position BETWEEN from_pos AND to_pos) a
        WHERE NOT EXISTS (
                  SELECT FROM outbox.event n
                  WHERE n.aggregate_type = a.aggregate_type AND n.aggregate_id = a.aggregate_id
                    AND n.position > to_pos
                    AND (n.headers @> '{"baseline": true}' OR n.type = n.aggregate_type || '.deleted'))
          -- Deleted with its last word here: there is nothing left to learn.
          AND (SELECT l.type FROM outbox.event l
               WHERE l.aggregate_type = a.aggregate_type AND l.aggregate_id = a.aggregate_id
               ORDER BY l.version DESC LIMIT 1) <> a.aggregate_type || '.deleted'
        LIMIT 1;
        IF FOUND THEN
            RETURN format('of %s/%s, for one, there is neither a baseline nor its deletion above it',
                          blocker.aggregate_type, blocker.aggregate_id);
        END IF;
    END IF;
    RETURN NULL;
END
$$;

-- What is full already counts from now on, whether or not a relay keeps everything.
DO $$
BEGIN
    PERFORM outbox.why_kept(p.name, '-infinity', true) FROM outbox.partition p;
END
$$;
