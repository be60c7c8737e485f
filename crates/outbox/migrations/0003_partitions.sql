-- Partitions: made ahead without ever stopping a writer, and emptied once nobody needs their history.
--
-- The relay's role owns nothing, so what it needs here are functions with the owner's rights. Each
-- checks for itself whether it may do what it is asked to; and each waits for a lock for a tenth of a
-- second at most, because whoever waits for a strong lock stops everybody who comes after it. Ask again.

-- The partitions: `lower` (null: from the beginning) up to, but without, `upper`. The net has neither.
CREATE VIEW outbox.partition AS
SELECT c.relname::text AS name,
       (regexp_match(b.bound, 'FROM \(''(-?\d+)''\)'))[1]::bigint AS lower,
       (regexp_match(b.bound, 'TO \(''(-?\d+)''\)'))[1]::bigint AS upper,
       b.bound = 'DEFAULT' AS is_default
FROM pg_inherits i
JOIN pg_class c ON c.oid = i.inhrelid
CROSS JOIN LATERAL (SELECT pg_get_expr(c.relpartbound, c.oid)) AS b (bound)
WHERE i.inhparent = 'outbox.event'::regclass;

-- Adds the partition above the highest one, for `size` positions, and returns its name; null when
-- somebody else is at it.
-- CREATE … PARTITION OF would wait for every open writer. A table of its own that is attached later does
-- not; only the net is locked for a moment, to see that it has no row that would belong here.
-- When positions have gone past the highest partition already, into the net, the new one begins a
-- whole `size` above them: rows are never moved.
CREATE FUNCTION outbox.add_partition(size bigint) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '100ms' AS $$
DECLARE
    mark      bigint;
    from_pos  bigint;
    number    bigint;
    partition text;
BEGIN
    IF size IS NULL OR size NOT BETWEEN 1000 AND 1000000000 THEN
        RAISE EXCEPTION 'a partition has from 1,000 to 1,000,000,000 positions, not %', size
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    -- One at a time. Key 1 of this class is the writers' lock, key 2 is this.
    IF NOT pg_try_advisory_xact_lock(1869968482, 2) THEN
        RETURN NULL;
    END IF;
    SELECT max(p.upper) INTO from_pos FROM outbox.partition p;
    SELECT last_value INTO mark FROM outbox.position;
    IF mark >= from_pos THEN
        from_pos := mark + size;
    END IF;
    SELECT max(substring(p.name FROM '^event_(\d+)$')::bigint) + 1 INTO number FROM outbox.partition p;
    partition := format('event_%s', number);
    EXECUTE format('CREATE TABLE outbox.%I (LIKE outbox.event INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', partition);
    EXECUTE format('CREATE UNIQUE INDEX %I ON outbox.%I (aggregate_type, aggregate_id, version)',
                   partition || '_aggregate', partition);
    EXECUTE format('ALTER TABLE outbox.event ATTACH PARTITION outbox.%I FOR VALUES FROM (%s) TO (%s)',
                   partition, from_pos, from_pos + size);
    RETURN partition;
END
$$;

-- Why a partition's events may not be retired yet, in words; null when they may. They may when
--   all positions were handed out, and every relay name has settled them;
--   no event of it is set aside, and no running replay still wants it (one that has said nothing for a
--   minute is dead);
--   its last event was appended before `older_than`;
--   of each aggregate in it there is a baseline or its deletion above it, so that whoever begins later
--   still learns the state: unless `without_baseline` gives that up.
-- The last rule reads the partition's index once, and a few rows above it per aggregate, by index.
CREATE FUNCTION outbox.why_kept(partition text, older_than timestamptz, without_baseline boolean) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '100ms' AS $$
DECLARE
    bounds  record;
    from_pos bigint;
    to_pos   bigint;
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
    IF (SELECT p.last_value < to_pos FROM outbox.position p) THEN
        RETURN 'it is in use';
    END IF;
    SELECT r.name, r.low_water INTO blocker FROM outbox.relay r ORDER BY r.low_water LIMIT 1;
    IF NOT FOUND THEN
        RETURN 'no relay has read it';
    ELSIF blocker.low_water < to_pos THEN
        RETURN format('the relay %s has settled everything only up to position %s, and this one ends with %s',
                      blocker.name, blocker.low_water, to_pos);
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
    SELECT e.created_at INTO blocker FROM outbox.event e
    WHERE e.position BETWEEN from_pos AND to_pos ORDER BY e.position DESC LIMIT 1;
    IF NOT FOUND THEN
        RETURN 'it is empty';
    ELSIF blocker.created_at >= older_than THEN
        RETURN format('its last event is of %s', to_char(blocker.created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI "UTC"'));
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

-- Empties a partition whose events nobody needs any more, by TRUNCATE: at once, and without a dead row.
-- Refuses, with the reason, what `outbox.why_kept` says must stay.
CREATE FUNCTION outbox.retire_partition(partition text, older_than timestamptz, without_baseline boolean)
    RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '100ms' AS $$
DECLARE
    reason text;
BEGIN
    -- The long look first, without a lock. Then the short one, while no replay can begin and, in the net,
    -- no row can come.
    reason := outbox.why_kept(partition, older_than, without_baseline);
    IF reason IS NULL THEN
        LOCK TABLE outbox.replay IN SHARE MODE;
        EXECUTE format('LOCK TABLE outbox.%I IN ACCESS EXCLUSIVE MODE', partition);
        reason := outbox.why_kept(partition, older_than, true);
    END IF;
    IF reason IS NOT NULL THEN
        RAISE EXCEPTION '% is kept: %', partition, reason USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    EXECUTE format('TRUNCATE outbox.%I', partition);
END
$$;

-- Drops a partition that was retired. This does lock the whole outbox for a moment, so it may well give
-- up; nothing depends on when it is done.
CREATE FUNCTION outbox.drop_partition(partition text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '50ms' AS $$
DECLARE
    bounds record;
    filled boolean;
BEGIN
    SELECT * INTO bounds FROM outbox.partition p WHERE p.name = drop_partition.partition;
    IF NOT FOUND OR bounds.is_default THEN
        RAISE EXCEPTION '% is no partition that could be dropped', partition USING ERRCODE = 'undefined_table';
    END IF;
    LOCK TABLE outbox.event IN ACCESS EXCLUSIVE MODE;
    EXECUTE format('SELECT EXISTS (SELECT FROM outbox.%I)', partition) INTO filled;
    IF filled OR (SELECT coalesce(min(r.low_water), 0) < bounds.upper - 1 FROM outbox.relay r) THEN
        RAISE EXCEPTION '% was not retired', partition USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    EXECUTE format('DROP TABLE outbox.%I', partition);
END
$$;

REVOKE ALL ON FUNCTION outbox.add_partition, outbox.why_kept, outbox.retire_partition, outbox.drop_partition FROM PUBLIC;

-- What a relay, and whoever operates it, needs and no more: the rights of before, and partitions.
CREATE OR REPLACE FUNCTION outbox.grant_relay(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA outbox TO %s', role);
    EXECUTE format('GRANT SELECT ON outbox.source, outbox.migration, outbox.event, outbox.position,'
                   ' outbox.partition, outbox.event_default TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE ON outbox.relay TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON outbox.parked, outbox.replay TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.add_partition, outbox.why_kept,'
                   ' outbox.retire_partition, outbox.drop_partition TO %s', role);
END
$$;
