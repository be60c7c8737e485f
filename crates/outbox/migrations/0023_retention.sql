-- Retention that reaches every outbox, whatever its rate. A partition was retired once all of its positions were handed
-- out: at 400 events a day, a million positions take seven years. Now the relay ends the partition in use when it has been
-- in use for long enough, so a partition has about a day of events, and at most its positions.
--
-- A partition is ended by leaving the rest of its positions out: the sequence moves on to the next partition. So no table
-- is locked, no bound is changed and no row is read, whatever the partition holds and whoever writes. (DETACH and ATTACH
-- with a lower bound would lock the whole outbox, and read the partition under that lock.) Positions are a bigint: a
-- million of them a day last for 20 billion years. The relay takes what was left out for positions that were rolled back.
SET LOCAL lock_timeout = '2s';

-- The partition that the next position belongs to.
--
--   since        when the partitions below it were seen full, and for the first one when the outbox got its name: by the
--                server's clock, never by what writers say.
--   next_begins  the first position of the next partition that is there already.
--   has_events   one row, by the partition's primary key.
CREATE VIEW outbox.partition_in_use AS
SELECT coalesce(p.name, 'event_default') AS name, p.name IS NULL AS is_default, m.position AS last_position,
       (SELECT min(n.lower) FROM outbox.partition n WHERE n.lower > m.position + 1) AS next_begins,
       coalesce((SELECT max(a.full_since) FROM outbox.partition_age a WHERE a.last_position < p.lower),
                (SELECT s.since FROM outbox.source s)) AS since,
       EXISTS (SELECT FROM outbox.event e WHERE e.position >= coalesce(p.lower, 0) AND e.position <= m.position
                                            AND p.name IS NOT NULL) AS has_events
FROM (SELECT least(CASE WHEN s.is_called THEN s.last_value ELSE s.last_value - 1 END, 9223372036854775806)
      FROM outbox.position s) AS m (position)
LEFT JOIN outbox.partition p ON NOT p.is_default AND m.position + 1 >= coalesce(p.lower, 0)
                                AND (p.upper IS NULL OR m.position + 1 < p.upper);
COMMENT ON VIEW outbox.partition_in_use IS
    'One row: the partition that writers fill, event_default when none was made in time. since: how long it has been in
use, by the server''s clock. next_begins: the first position of the next one; null when there is none yet. has_events: it
holds events; of event_default this is always false.';

-- Lets writers begin the next partition: hands out the positions up to it, unused. Does so where writers are in the net, and
-- where the partition in use has events and has been in use since before `older_than`. Returns its name, and whether the
-- next one has begun: a call leaves out a million positions at most, so call it again. No name: there is nothing to do, or
-- another session is at it.
--
-- nextval only goes forward and is safe beside writers, where setval is neither. It takes no lock that a writer waits for.
-- No row will come at these positions, so the lock of outbox.next_position() is not needed.
CREATE FUNCTION outbox.begin_next_partition(older_than timestamptz, OUT partition text, OUT has_begun boolean)
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '100ms' AS $$
DECLARE
    in_use  record;
    used    bigint;
    stop_at bigint;
BEGIN
    -- One at a time, and not while a partition is added.
    IF NOT pg_try_advisory_xact_lock(1869968482, 2) THEN
        RETURN;
    END IF;
    SELECT * INTO in_use FROM outbox.partition_in_use;
    IF in_use.next_begins IS NULL
       OR NOT in_use.is_default AND NOT (in_use.has_events AND coalesce(in_use.since < older_than, false)) THEN
        RETURN;
    END IF;
    -- A sequence that is behind (a restore, a failover) is for an operator to mend, who has to see that it is.
    IF (SELECT o.used_position > o.last_position FROM outbox.overview o) THEN
        RETURN;
    END IF;
    partition := in_use.name;
    used := in_use.last_position;
    stop_at := least(in_use.next_begins - 1, used + 1000000);
    WHILE used < stop_at LOOP
        SELECT max(nextval('outbox.position')) INTO used FROM generate_series(1, least(stop_at - used, 1000));
    END LOOP;
    has_begun := used >= in_use.next_begins - 1;
    IF has_begun THEN
        -- Notes since when it is full, which is since when the next one is in use.
        PERFORM outbox.why_kept(in_use.name, '-infinity', true);
    END IF;
END
$$;
COMMENT ON FUNCTION outbox.begin_next_partition(timestamptz) IS
    'Lets writers begin the next partition where the one in use has events and is in use since before older_than.';
REVOKE EXECUTE ON FUNCTION outbox.begin_next_partition(timestamptz) FROM PUBLIC;

-- Why a partition's events may not be retired yet, apart from baselines: in one word for programs, and in words. Both null
-- when they may. As before, but a relay has to have settled the partition's last event, not its last position: where
-- positions were left out and no event came since, no relay gets to the last position. What a writer still has open is in
-- nobody's way: the partition is looked at again under a lock that waits for that writer.
CREATE FUNCTION outbox.retention_state(partition text, older_than timestamptz, OUT kind text, OUT reason text)
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    bounds   record;
    from_pos bigint;
    to_pos   bigint;
    last_pos bigint;
    mark     bigint;
    since    timestamptz;
    blocker  record;
BEGIN
    SELECT * INTO bounds FROM outbox.partition p WHERE p.name = retention_state.partition;
    IF NOT FOUND THEN
        kind := 'missing';
        reason := format('there is no partition %s', partition);
        RETURN;
    END IF;
    IF bounds.is_default THEN
        SELECT min(e.position), max(e.position) INTO from_pos, to_pos FROM outbox.event_default e;
    ELSE
        from_pos := coalesce(bounds.lower, 0);
        to_pos := bounds.upper - 1;
    END IF;
    IF to_pos IS NULL THEN
        kind := 'empty';
        reason := 'it is empty';
        RETURN;
    END IF;
    SELECT CASE WHEN p.is_called THEN p.last_value ELSE p.last_value - 1 END INTO mark FROM outbox.position p;
    IF mark < to_pos THEN
        kind := 'in use';
        reason := format('writers still fill it: its positions end with %s, and %s was the last one handed out', to_pos, mark);
        RETURN;
    END IF;
    SELECT e.position INTO last_pos FROM outbox.event e
    WHERE e.position BETWEEN from_pos AND to_pos ORDER BY e.position DESC LIMIT 1;
    SELECT r.name, r.low_water, r.heartbeat_at INTO blocker FROM outbox.relay r ORDER BY r.low_water LIMIT 1;
    IF NOT FOUND THEN
        kind := 'unread';
        reason := 'no relay has read it';
        RETURN;
    ELSIF blocker.low_water < coalesce(last_pos, to_pos) THEN
        kind := 'unsettled';
        reason := format('the relay %s has settled everything only up to position %s, and the last event here is at %s; %s',
                         blocker.name, blocker.low_water, coalesce(last_pos, to_pos),
                         coalesce('its last heartbeat was of '
                                  || to_char(blocker.heartbeat_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI "UTC"'),
                                  'it has never run'));
        RETURN;
    END IF;
    -- By the primary key, for each relay name.
    SELECT coalesce(sum(k.events), 0) AS events, min(r.name) FILTER (WHERE k.events > 0) AS relay INTO blocker
    FROM outbox.relay r
    CROSS JOIN LATERAL (SELECT count(*) AS events FROM outbox.parked k
                        WHERE k.relay = r.name AND k.position BETWEEN from_pos AND to_pos) AS k;
    IF blocker.events > 0 THEN
        kind := 'parked';
        reason := format('%s of its events are set aside (relay %s)', blocker.events, blocker.relay);
        RETURN;
    END IF;
    SELECT r.id, r.started_by INTO blocker FROM outbox.replay r
    WHERE r.next_position <= to_pos AND r.to_position >= from_pos
      AND r.heartbeat_at > clock_timestamp() - interval '1 minute' LIMIT 1;
    IF FOUND THEN
        kind := 'replayed';
        reason := format('the replay %s of %s still reads it', blocker.id, blocker.started_by);
        RETURN;
    END IF;
    IF last_pos IS NULL THEN
        kind := 'empty';
        reason := 'it is empty';
        RETURN;
    END IF;
    -- One that was never noted counts from now.
    SELECT a.full_since INTO since FROM outbox.partition_age a WHERE a.name = partition AND a.last_position = to_pos;
    since := coalesce(since, clock_timestamp());
    IF since >= older_than THEN
        kind := 'young';
        reason := format('it is full only since %s', to_char(since AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI "UTC"'));
    END IF;
END
$$;
REVOKE EXECUTE ON FUNCTION outbox.retention_state(text, timestamptz) FROM PUBLIC;

-- As before, in words.
CREATE OR REPLACE FUNCTION outbox.retention_blocker(partition text, older_than timestamptz, without_baseline boolean) RETURNS text
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    reason text := (SELECT s.reason FROM outbox.retention_state(partition, older_than) s);
BEGIN
    IF reason IS NOT NULL OR without_baseline THEN
        RETURN reason;
    END IF;
    RETURN (SELECT outbox.keeping_words(k.of_type, k.of_id)
            FROM outbox.keeping_aggregate(partition, outbox.partition_end(partition)) k);
END
$$;

-- The first `most` aggregates that keep a partition, in the order of its index. The search is that of
-- outbox.keeping_aggregate, which is made of it below.
CREATE FUNCTION outbox.keeping_aggregates(partition text, to_pos bigint, most integer)
    RETURNS TABLE (of_type text, of_id text)
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
    SET standard_conforming_strings = on
    SET enable_nestloop = off
    SET enable_hashjoin = off
    SET enable_hashagg = off
    SET enable_bitmapscan = off
    SET jit = off AS $$
BEGIN
    RETURN QUERY EXECUTE format($search$
        SELECT c.aggregate_type, c.aggregate_id
        FROM (SELECT a.aggregate_type, a.aggregate_id
              FROM (SELECT DISTINCT e.aggregate_type, e.aggregate_id FROM outbox.%I e) AS a
              WHERE NOT EXISTS (
                  SELECT FROM outbox.event n
                  WHERE n.aggregate_type = a.aggregate_type AND n.aggregate_id = a.aggregate_id AND n.position > %s
                    AND (n.headers @> '{"baseline": true}' OR n.type = n.aggregate_type || '.deleted'))
              OFFSET 0) AS c
        WHERE outbox.is_keeping(c.aggregate_type, c.aggregate_id, %s)
        LIMIT %s $search$, partition, to_pos, to_pos, most);
END
$$;
REVOKE EXECUTE ON FUNCTION outbox.keeping_aggregates(text, bigint, integer) FROM PUBLIC;

-- As before, an aggregate that keeps a partition; no row when there is none. First the one that did last time.
CREATE OR REPLACE FUNCTION outbox.keeping_aggregate(partition text, to_pos bigint, OUT of_type text, OUT of_id text)
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    SELECT a.keeping_type, a.keeping_id INTO of_type, of_id FROM outbox.partition_age a
    WHERE a.name = partition AND a.last_position = to_pos AND outbox.is_keeping(a.keeping_type, a.keeping_id, to_pos);
    IF of_id IS NULL THEN
        SELECT k.of_type, k.of_id INTO of_type, of_id FROM outbox.keeping_aggregates(partition, to_pos, 1) k;
    END IF;
END
$$;

-- What keeps a partition, for a command that explains it: the state of outbox.retention_state; and where that has nothing
-- against it, `lacking`, with the first `most` aggregates that have neither a baseline nor a deletion above it.
CREATE FUNCTION outbox.what_keeps(partition text, older_than timestamptz, most integer,
                                  OUT kind text, OUT reason text, OUT aggregates text[])
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    SELECT s.kind, s.reason INTO kind, reason FROM outbox.retention_state(partition, older_than) s;
    aggregates := '{}';
    IF kind IS NULL THEN
        aggregates := ARRAY(SELECT k.of_type || '/' || k.of_id
                            FROM outbox.keeping_aggregates(partition, outbox.partition_end(partition), most) k);
        IF aggregates <> '{}' THEN
            kind := 'lacking';
            reason := 'aggregates have neither a baseline nor their deletion above it';
        END IF;
    END IF;
END
$$;
COMMENT ON FUNCTION outbox.what_keeps(text, timestamptz, integer) IS
    'What keeps a partition, and the first aggregates that do so because they lack a baseline.';
REVOKE EXECUTE ON FUNCTION outbox.what_keeps(text, timestamptz, integer) FROM PUBLIC;

-- What an operator's role needs to look, as before, and the partition in use.
CREATE OR REPLACE FUNCTION outbox.grant_reader(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA outbox TO %s', role);
    EXECUTE format('GRANT SELECT ON outbox.source, outbox.migration, outbox.position, outbox.erasure, outbox.partition,'
                   ' outbox.overview, outbox.relay_status, outbox.leader_session, outbox.lock_holder,'
                   ' outbox.event_progress, outbox.parked_event, outbox.parked_group, outbox.waiting_group,'
                   ' outbox.partition_status, outbox.partition_in_use, outbox.aggregate, outbox.aggregate_type,'
                   ' outbox.captured, outbox.capture_problem TO %s', role);
    EXECUTE format('GRANT SELECT (position, id, aggregate_type, aggregate_id, version, type, created_at, previous_id)'
                   ' ON outbox.event TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.leader_pid, outbox.retention_blocker TO %s', role);
END
$$;
SELECT outbox.grant_reader(r.grantee::regrole)
FROM pg_class c, aclexplode(c.relacl) r
WHERE c.oid = 'outbox.relay_status'::regclass AND r.privilege_type = 'SELECT' AND r.grantee <> c.relowner AND r.grantee <> 0;

-- What a relay's role needs, as before, to begin the next partition, and to say what keeps one.
CREATE OR REPLACE FUNCTION outbox.grant_relay(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
DECLARE
    captured record;
BEGIN
    PERFORM outbox.grant_reader(role);
    EXECUTE format('GRANT SELECT ON outbox.event, outbox.event_default TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE ON outbox.relay TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON outbox.parked, outbox.replay TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.add_partition, outbox.begin_next_partition, outbox.why_kept,'
                   ' outbox.what_keeps, outbox.retire_partition, outbox.drop_partition TO %s', role);
    EXECUTE format('GRANT SELECT ON outbox.readable, outbox.readable_parked, outbox.captured_type,'
                   ' outbox.captured_table TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.erase_step, outbox.try_lead, outbox.keep_erasures_out,'
                   ' outbox.keep_no_samples, outbox.capture_of, outbox.captured_difference, outbox.publish_state,'
                   ' outbox.publish_states, outbox.captured_keys, outbox.captured_keys_query, outbox.base_type,'
                   ' outbox.begin_states, outbox.captured_states TO %s', role);
    FOR captured IN SELECT c.capture FROM outbox.captured_type c LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION outbox_capture.read_%1$s, outbox_capture.state_%1$s, '
                       'outbox_capture.keys_%1$s TO %2$s', captured.capture, role);
    END LOOP;
END
$$;
SELECT outbox.grant_relay(r.grantee::regrole)
FROM pg_class c, aclexplode(c.relacl) r
WHERE c.oid = 'outbox.parked'::regclass AND r.privilege_type = 'INSERT' AND r.grantee <> c.relowner;
