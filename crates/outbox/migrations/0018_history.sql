-- Retention over a long history: what keeps a partition is found by one pass over two short indexes, and remembered.
SET LOCAL lock_timeout = '2s';

-- Which aggregate kept a partition when that was last looked for. While it still does, nothing else is looked at.
ALTER TABLE outbox.partition_age
    ADD COLUMN keeping_type text,
    ADD COLUMN keeping_id   text;

-- Each partition has an index of its events that carry the whole state of an aggregate: baselines and deletions. There
-- are few of these, and a writer of another event only computes the condition. Such an index is made with the partition.
-- For a partition that is there already and has more than 10,000 events, it would lock out erasures for seconds, so this
-- migration makes it for small ones alone. `outbox-relay migrate` makes the others, without a lock that stops a writer.
CREATE FUNCTION outbox.whole_state_index(partition text, beside_writers boolean) RETURNS text
    LANGUAGE sql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
    SET standard_conforming_strings = on AS $$
    SELECT format('CREATE INDEX %s %I ON outbox.%I (aggregate_type, aggregate_id, position)'
                  ' WHERE headers @> ''{"baseline": true}'' OR type = aggregate_type || ''.deleted''',
                  CASE WHEN beside_writers THEN 'CONCURRENTLY' ELSE '' END, partition || '_whole_state', partition)
$$;
COMMENT ON FUNCTION outbox.whole_state_index(text, boolean) IS
    'The statement that makes a partition''s index of baselines and deletions.';
REVOKE EXECUTE ON FUNCTION outbox.whole_state_index(text, boolean) FROM PUBLIC;

CREATE VIEW outbox.partition_without_index AS
SELECT p.name, p.lower, p.upper, p.is_default
FROM outbox.partition p
WHERE NOT EXISTS (SELECT FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
                  WHERE i.indrelid = to_regclass(format('outbox.%I', p.name)) AND i.indisvalid
                    AND c.relname = p.name || '_whole_state');
COMMENT ON VIEW outbox.partition_without_index IS
    'A row: a partition that has no valid index of its baselines and deletions yet. outbox-relay migrate makes it.';

DO $$
DECLARE
    partition text;
    few       boolean;
BEGIN
    FOR partition IN SELECT p.name FROM outbox.partition_without_index p LOOP
        EXECUTE format('SELECT count(*) <= 10000 FROM (SELECT FROM outbox.%I LIMIT 10001) AS l', partition) INTO few;
        IF few THEN
            EXECUTE outbox.whole_state_index(partition, false);
        END IF;
    END LOOP;
END
$$;

-- As before, with that index.
CREATE OR REPLACE FUNCTION outbox.add_partition(size bigint) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '100ms'
    SET standard_conforming_strings = on AS $$
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
    SELECT last_value INTO mark FROM outbox.position;
    IF mark > 8000000000000000000 THEN
        RAISE EXCEPTION 'the sequence outbox.position stands at %, near its end, where writers get no position any more. '
                        'It was set there by hand. If no event has a position up there, set it back to the highest '
                        'position in use: SELECT setval(''outbox.position'', greatest(1, '
                        '(SELECT max(position) FROM outbox.event), '
                        '(SELECT max(greatest(low_water, high)) FROM outbox.relay)))', mark
            USING ERRCODE = 'sequence_generator_limit_exceeded';
    END IF;
    SELECT max(p.upper) INTO from_pos FROM outbox.partition p;
    IF mark >= from_pos THEN
        from_pos := mark + size;
    END IF;
    SELECT max(substring(p.name FROM '^event_(\d+)$')::bigint) + 1 INTO number FROM outbox.partition p;
    partition := format('event_%s', number);
    EXECUTE format('CREATE TABLE outbox.%I (LIKE outbox.event INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', partition);
    EXECUTE format('CREATE UNIQUE INDEX %I ON outbox.%I (aggregate_type, aggregate_id, version)',
                   partition || '_aggregate', partition);
    EXECUTE outbox.whole_state_index(partition, false);
    EXECUTE format('ALTER TABLE outbox.event ATTACH PARTITION outbox.%I FOR VALUES FROM (%s) TO (%s)',
                   partition, from_pos, from_pos + size);
    RETURN partition;
END
$$;

-- Whether an aggregate keeps a partition that ends with `to_pos`: there is neither a baseline nor its deletion above it,
-- and its last event is no deletion either (deleted with its last event in the partition, there is nothing left to learn).
-- A few rows of each partition above, by index.
CREATE FUNCTION outbox.is_keeping(of_type text, of_id text, to_pos bigint) RETURNS boolean
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
    SET enable_seqscan = off AS $$
BEGIN
    RETURN NOT EXISTS (
               SELECT FROM outbox.event n
               WHERE n.aggregate_type = of_type AND n.aggregate_id = of_id AND n.position > to_pos
                 AND (n.headers @> '{"baseline": true}' OR n.type = n.aggregate_type || '.deleted'))
       AND (SELECT l.type FROM outbox.event l
            WHERE l.aggregate_type = of_type AND l.aggregate_id = of_id
            ORDER BY l.version DESC LIMIT 1) <> of_type || '.deleted';
END
$$;
REVOKE EXECUTE ON FUNCTION outbox.is_keeping(text, text, bigint) FROM PUBLIC;

-- An aggregate that keeps a partition; no row when there is none. First the one that did last time. Then the partition's
-- aggregates in the order of its index, beside the indexes of baselines and deletions above it in the same order: the
-- first that is missing there ends the search.
--
-- The order of both sides is what makes this fast, so the server may join in no other way. For each aggregate it would
-- otherwise look into every partition above: millions of times.
CREATE FUNCTION outbox.keeping_aggregate(partition text, to_pos bigint, OUT of_type text, OUT of_id text)
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
    SET standard_conforming_strings = on
    SET enable_nestloop = off
    SET enable_hashjoin = off
    SET enable_hashagg = off
    SET enable_bitmapscan = off
    SET jit = off AS $$
BEGIN
    SELECT a.keeping_type, a.keeping_id INTO of_type, of_id FROM outbox.partition_age a
    WHERE a.name = partition AND a.last_position = to_pos AND outbox.is_keeping(a.keeping_type, a.keeping_id, to_pos);
    IF of_id IS NOT NULL THEN
        RETURN;
    END IF;
    EXECUTE format($search$
        SELECT c.aggregate_type, c.aggregate_id
        FROM (SELECT a.aggregate_type, a.aggregate_id
              FROM (SELECT DISTINCT e.aggregate_type, e.aggregate_id FROM outbox.%I e) AS a
              WHERE NOT EXISTS (
                  SELECT FROM outbox.event n
                  WHERE n.aggregate_type = a.aggregate_type AND n.aggregate_id = a.aggregate_id AND n.position > %s
                    AND (n.headers @> '{"baseline": true}' OR n.type = n.aggregate_type || '.deleted'))
              OFFSET 0) AS c
        WHERE outbox.is_keeping(c.aggregate_type, c.aggregate_id, %s)
        LIMIT 1 $search$, partition, to_pos, to_pos) INTO of_type, of_id;
END
$$;
REVOKE EXECUTE ON FUNCTION outbox.keeping_aggregate(text, bigint) FROM PUBLIC;

-- The last position that a partition may have an event at; null for an empty net.
CREATE FUNCTION outbox.partition_end(partition text) RETURNS bigint
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN p.is_default THEN (SELECT max(e.position) FROM outbox.event_default e) ELSE p.upper - 1 END
    FROM outbox.partition p WHERE p.name = partition
$$;
REVOKE EXECUTE ON FUNCTION outbox.partition_end(text) FROM PUBLIC;

-- In words, what is kept for an aggregate, and what to do.
CREATE FUNCTION outbox.keeping_words(of_type text, of_id text) RETURNS text
    LANGUAGE sql IMMUTABLE
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT format('of %s/%s, for one, there is neither a baseline nor its deletion above it: '
                  'publish a baseline of each aggregate that has events in it, or give up its history (without baseline)',
                  of_type, of_id)
    WHERE of_id IS NOT NULL
$$;
REVOKE EXECUTE ON FUNCTION outbox.keeping_words(text, text) FROM PUBLIC;

-- Why a partition's events may not be retired yet, in words; null when they may. As before, but the last rule, for
-- which `without_baseline` is false, is outbox.keeping_aggregate.
CREATE OR REPLACE FUNCTION outbox.retention_blocker(partition text, older_than timestamptz, without_baseline boolean) RETURNS text
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    bounds   record;
    from_pos bigint;
    to_pos   bigint;
    mark     bigint;
    since    timestamptz;
    blocker  record;
BEGIN
    SELECT * INTO bounds FROM outbox.partition p WHERE p.name = retention_blocker.partition;
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
    SELECT r.name, r.low_water, r.heartbeat_at INTO blocker FROM outbox.relay r ORDER BY r.low_water LIMIT 1;
    IF NOT FOUND THEN
        RETURN 'no relay has read it';
    ELSIF blocker.low_water < to_pos THEN
        RETURN format('the relay %s has settled everything only up to position %s, and this one ends with %s; %s',
                      blocker.name, blocker.low_water, to_pos,
                      coalesce('its last heartbeat was of ' || to_char(blocker.heartbeat_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI "UTC"'),
                               'it has never run'));
    END IF;
    -- By the primary key, for each relay name.
    SELECT coalesce(sum(k.events), 0) AS events, min(r.name) FILTER (WHERE k.events > 0) AS relay INTO blocker
    FROM outbox.relay r
    CROSS JOIN LATERAL (SELECT count(*) AS events FROM outbox.parked k
                        WHERE k.relay = r.name AND k.position BETWEEN from_pos AND to_pos) AS k;
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
    -- One that was never noted counts from now.
    SELECT a.full_since INTO since FROM outbox.partition_age a WHERE a.name = partition AND a.last_position = to_pos;
    since := coalesce(since, clock_timestamp());
    IF since >= older_than THEN
        RETURN format('it is full only since %s',
                      to_char(since AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI "UTC"'));
    END IF;
    IF NOT without_baseline THEN
        RETURN (SELECT outbox.keeping_words(k.of_type, k.of_id) FROM outbox.keeping_aggregate(partition, to_pos) k);
    END IF;
    RETURN NULL;
END
$$;

-- As before: why a partition is kept. It first notes since when the partition is full, where it is; and then which
-- aggregate keeps it, so that the next look begins with that.
CREATE OR REPLACE FUNCTION outbox.why_kept(partition text, older_than timestamptz, without_baseline boolean) RETURNS text
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '100ms' AS $$
DECLARE
    to_pos bigint := outbox.partition_end(partition);
    reason text;
    found  record;
BEGIN
    INSERT INTO outbox.partition_age AS a (name, last_position)
    SELECT partition, to_pos
    WHERE to_pos <= (SELECT CASE WHEN m.is_called THEN m.last_value ELSE m.last_value - 1 END FROM outbox.position m)
    ON CONFLICT (name) DO UPDATE SET last_position = excluded.last_position, full_since = clock_timestamp(),
                                     keeping_type = NULL, keeping_id = NULL
    WHERE a.last_position <> excluded.last_position;
    reason := outbox.retention_blocker(partition, older_than, true);
    IF reason IS NOT NULL OR without_baseline THEN
        RETURN reason;
    END IF;
    SELECT k.of_type, k.of_id INTO found FROM outbox.keeping_aggregate(partition, to_pos) k;
    UPDATE outbox.partition_age a SET keeping_type = found.of_type, keeping_id = found.of_id
    WHERE a.name = partition AND (a.keeping_type, a.keeping_id) IS DISTINCT FROM (found.of_type, found.of_id);
    RETURN outbox.keeping_words(found.of_type, found.of_id);
END
$$;
