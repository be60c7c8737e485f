-- What is known of an outbox, as views: each question is asked once, here, for the commands, the metrics and every
-- other program that shows it.
--
-- Rights. The views run with their owner's rights, so an operator's role reads them and needs no right on the tables,
-- which hold bodies. No view has a body or a header. (outbox.readable and outbox.readable_parked have both. They run
-- with the reader's rights, so they open no body to a role that may not read the table.) What the server shows of other
-- sessions still depends on the role that asks: without pg_read_all_stats, the state and the times of others are null.
--
-- Cost. Everything that costs more than a row is a subquery in a column, or a stable function. The server leaves out
-- such a column when a statement does not name it. So name the columns: `SELECT *` computes all of them. Counts of
-- events end at 10,001, which says "more than 10,000". What is at most so many rows by nature is counted to the end.
--
-- Times are those of the statement (statement_timestamp()), which are stable. A volatile function, such as
-- clock_timestamp(), would keep the server from leaving columns out.

-- Who holds the outbox lock: the shared advisory lock (1869968482, 1) that outbox.next_position() takes. A prepared
-- transaction has no session. Its locks keep the virtual transaction id of the session that prepared it, and have
-- `-1/<xid>` after a restart of the server. Among them is the lock on its transaction id, by which it is found.
--
-- One look at the server's lock table, and one more while a prepared transaction holds the lock.
CREATE VIEW outbox.lock_holder AS
SELECT l.virtualtransaction AS virtual_transaction, l.pid, a.application_name, a.state, p.gid,
       coalesce(a.xact_start, p.prepared) AS since,
       CASE WHEN l.pid IS NULL THEN p.prepared
            WHEN a.state LIKE 'idle in transaction%' THEN a.state_change END AS idle_since
FROM pg_locks l
LEFT JOIN pg_stat_activity a ON a.pid = l.pid
LEFT JOIN LATERAL (
    SELECT x.gid, x.prepared FROM pg_locks t JOIN pg_prepared_xacts x ON x.transaction = t.transactionid
    WHERE l.pid IS NULL AND t.pid IS NULL AND t.locktype = 'transactionid'
      AND t.virtualtransaction = l.virtualtransaction) p ON true
WHERE l.locktype = 'advisory' AND l.classid = 1869968482 AND l.objid = 1 AND l.objsubid = 2 AND l.granted
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database());
COMMENT ON VIEW outbox.lock_holder IS
    'A row: a transaction that holds the outbox lock, so it may still bring a position that is missing.
pid is null and gid is set: it is prepared. since: when it began, or was prepared. idle_since: since when it has done
nothing, null while it works. Without pg_read_all_stats, what belongs to sessions of other roles is null.';

-- Who holds a relay's leadership: the advisory lock (1869968492, outbox.relay.id) that outbox.try_lead() takes. One look
-- at the server's lock table.
CREATE VIEW outbox.leader_session AS
SELECT l.objid::bigint AS relay_id, l.pid
FROM pg_locks l
WHERE l.locktype = 'advisory' AND l.classid = 1869968492 AND l.objsubid = 2 AND l.granted
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database());
COMMENT ON VIEW outbox.leader_session IS
    'A row: a session that holds the leadership of the relay name with this id (outbox.relay.id).';

-- The session that leads, of a relay name's id. pg_locks is volatile, and the server would compute it for every reader of
-- a view with such a column. This is stable, so it is left out where it is not named.
CREATE FUNCTION outbox.leader_pid(relay integer) RETURNS integer
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp
    AS $$ SELECT min(s.pid) FROM outbox.leader_session s WHERE s.relay_id = relay $$;
REVOKE EXECUTE ON FUNCTION outbox.leader_pid(integer) FROM PUBLIC;

-- Where the relays stand. By outbox.relay's primary key when a name is given; there are few.
--
--   open_events, new_events  by the partitions' primary keys, at most 10,001 rows each, however large the outbox is.
--   oldest_created_at        one row for each open range (a relay stores at most 1,000), and one above `high`.
--   parked_events            by the index parked_aside alone: as many entries as --max-parked allows (100,000: 20 ms).
--   waiting_events           by the index parked_waiting, at most 10,001 entries.
--   leader_pid, leads        a look at the server's lock table each.
--
-- A leader that has stored no heartbeat for 15 seconds does not lead: another relay ends its session.
CREATE VIEW outbox.relay_status AS
SELECT r.name, r.low_water, r.high,
       (SELECT count(*) FROM unnest(r.open)) AS open_ranges,
       (SELECT coalesce(sum(upper(o.range) - lower(o.range)), 0)::bigint FROM unnest(r.open) AS o (range)) AS open_positions,
       (SELECT count(*) FROM (
            SELECT FROM unnest(r.open) AS o (range)
            CROSS JOIN LATERAL (SELECT FROM outbox.event e
                                WHERE e.position >= lower(o.range) AND e.position < upper(o.range)
                                ORDER BY e.position LIMIT 10001) AS stored
            LIMIT 10001) AS counted) AS open_events,
       (SELECT count(*) FROM (
            SELECT FROM outbox.event e WHERE e.position > r.high ORDER BY e.position LIMIT 10001) AS counted) AS new_events,
       (SELECT first.created_at FROM (
            (SELECT stored.position, stored.created_at FROM unnest(r.open) AS o (range)
             CROSS JOIN LATERAL (SELECT e.position, e.created_at FROM outbox.event e
                                 WHERE e.position >= lower(o.range) AND e.position < upper(o.range)
                                 ORDER BY e.position LIMIT 1) AS stored
             ORDER BY stored.position LIMIT 1)
            UNION ALL
            (SELECT e.position, e.created_at FROM outbox.event e WHERE e.position > r.high ORDER BY e.position LIMIT 1)
            ) AS first ORDER BY first.position LIMIT 1) AS oldest_created_at,
       (SELECT count(*) FROM outbox.parked p WHERE p.relay = r.name AND p.state = 'parked') AS parked_events,
       (SELECT count(*) FROM (
            SELECT FROM outbox.parked p WHERE p.relay = r.name AND p.state = 'waiting' LIMIT 10001) AS counted) AS waiting_events,
       r.leader, r.leader_since, r.heartbeat_at,
       CASE WHEN r.heartbeat_at IS NOT NULL
            THEN greatest(extract(epoch FROM statement_timestamp() - r.heartbeat_at), 0)::float8 END AS heartbeat_age_seconds,
       outbox.leader_pid(r.id) AS leader_pid,
       coalesce(r.heartbeat_at >= statement_timestamp() - interval '15 seconds', false)
           AND outbox.leader_pid(r.id) IS NOT NULL AS leads,
       r.paused_at, r.paused_by, r.waiting
FROM outbox.relay r;
COMMENT ON VIEW outbox.relay_status IS
    'A row: a relay name, with its progress, its backlog and its leader.
low_water: every position up to here is settled. high: the last position read. open_ranges, open_positions: what lies
between them and is not settled. open_events, new_events: stored events in these ranges, and above high; 10001 means more
than 10000. oldest_created_at: of the first of these events. parked_events: set aside. waiting_events: they wait in
outbox.parked; 10001 means more than 10000. leader, leader_since: of the leader, or the last one. leads: a session has the
leadership and its last heartbeat is at most 15 seconds old. waiting: what the leader waits for, a JSON array.';

-- How far each relay is with each event. What is set aside was settled as well, so that comes first. Between low_water
-- and high, the open ranges are what is not settled. Of events dropped long ago it is not known: outbox.relay keeps the
-- newest 200 ranges of them.
--
-- Give the position: then it is one row of outbox.event, by the primary key, and for each relay name one of
-- outbox.parked, by the primary key.
CREATE VIEW outbox.event_progress AS
SELECT e.position, e.id, r.name AS relay,
       CASE WHEN p.state = 'waiting' THEN 'waits'
            WHEN p.position IS NOT NULL THEN 'parked'
            WHEN e.position > r.high THEN 'waiting'
            WHEN e.position > r.low_water AND r.open @> e.position THEN 'under way'
            WHEN r.dropped_by_hand @> e.position THEN 'dropped by hand'
            WHEN r.dropped_by_rule @> e.position THEN 'dropped by rule'
            WHEN e.position <= r.told_from THEN 'settled'
            WHEN e.position < lower(r.dropped_by_rule) AND (SELECT count(*) FROM unnest(r.dropped_by_rule)) >= 200
              OR e.position < lower(r.dropped_by_hand) AND (SELECT count(*) FROM unnest(r.dropped_by_hand)) >= 200 THEN 'settled'
            ELSE 'confirmed' END AS state,
       p.detail, p.next_attempt_at
FROM outbox.event e
CROSS JOIN outbox.relay r
LEFT JOIN outbox.parked p ON p.relay = r.name AND p.position = e.position;
COMMENT ON VIEW outbox.event_progress IS
    'A row: an event and a relay name. Give the position.
state: waiting (not read yet), under way, waits (the broker does not take it, or an earlier event of its aggregate),
parked, confirmed, dropped by hand, dropped by rule, or settled, where it is not known how. detail, next_attempt_at: of
an event that is parked or waits.';

-- What is set aside or waits, without bodies. Of the events that wait, only the first of an aggregate has a
-- next_attempt_at.
CREATE VIEW outbox.parked_event AS
SELECT p.relay, p.position, p.id, p.aggregate_type, p.aggregate_id, p.version, p.type, p.state, p.reason, p.detail,
       p.attempts, p.created_at, p.parked_at, p.last_attempt_at, p.next_attempt_at
FROM outbox.parked p;
COMMENT ON VIEW outbox.parked_event IS
    'A row: an event that a relay set aside (state parked), or that waits in the database (state waiting); without its
body and headers. next_attempt_at: null means only by hand, or, where it waits, behind an earlier event.';

-- The same summed up. A refusal names the event, so its text makes no group.
--
-- Give the relay and the state: what is parked is read by the index parked_aside, as many rows as --max-parked allows
-- (100,000: 0.1 s). What waits may be millions of rows, and all of them are read: ask outbox.waiting_group first.
CREATE VIEW outbox.parked_group AS
SELECT p.relay, p.state, p.reason, p.type, CASE WHEN p.reason <> 'refused' THEN p.detail ELSE '' END AS detail,
       count(*) AS events, min(p.parked_at) AS since, min(p.position) AS oldest_position,
       min(p.next_attempt_at) AS next_attempt_at
FROM outbox.parked p
GROUP BY 1, 2, 3, 4, 5;
COMMENT ON VIEW outbox.parked_group IS
    'A row: the events in outbox.parked of a relay that have the same state, reason, type and detail. Give relay and state.
detail: empty where the reason is refused, since each refusal has a text of its own.';

-- What waits in the database, quickly in front of millions of rows: the first events of aggregates, which are the ones
-- that are tried. A kind (a type and an aggregate type) is found by one step in the index parked_waiting_due. Of at most
-- 20 kinds of a relay at most 10,001 rows each are read.
CREATE VIEW outbox.waiting_group AS
SELECT r.name AS relay, g.type, g.reason, g.aggregates, g.since, g.oldest_id, g.detail, g.next_attempt_at
FROM outbox.relay r
CROSS JOIN LATERAL (
    WITH RECURSIVE kind AS (
        (SELECT w.type, w.aggregate_type FROM outbox.parked w
         WHERE w.relay = r.name AND w.state = 'waiting' AND w.next_attempt_at IS NOT NULL
         ORDER BY w.type, w.aggregate_type LIMIT 1)
        UNION ALL
        SELECT n.type, n.aggregate_type FROM kind k
        CROSS JOIN LATERAL (SELECT w.type, w.aggregate_type FROM outbox.parked w
                            WHERE w.relay = r.name AND w.state = 'waiting' AND w.next_attempt_at IS NOT NULL
                              AND (w.type, w.aggregate_type) > (k.type, k.aggregate_type)
                            ORDER BY w.type, w.aggregate_type LIMIT 1) AS n),
    first AS (
        SELECT f.* FROM (SELECT k.type, k.aggregate_type FROM kind k LIMIT 20) AS k
        CROSS JOIN LATERAL (SELECT w.position, w.id, w.type, w.reason, w.detail, w.parked_at, w.next_attempt_at
                            FROM outbox.parked w
                            WHERE w.relay = r.name AND w.state = 'waiting' AND w.next_attempt_at IS NOT NULL
                              AND w.type = k.type AND w.aggregate_type = k.aggregate_type LIMIT 10001) AS f)
    SELECT f.type, f.reason, count(*) AS aggregates, min(f.parked_at) AS since,
           (array_agg(f.id ORDER BY f.position))[1] AS oldest_id,
           (array_agg(f.detail ORDER BY f.position))[1] AS detail, min(f.next_attempt_at) AS next_attempt_at
    FROM first f GROUP BY f.type, f.reason) AS g;
COMMENT ON VIEW outbox.waiting_group IS
    'A row: the aggregates of a relay whose first waiting event has the same type and reason. Give the relay.
aggregates: 10001 of an aggregate type means more than 10000. reason: behind means not tried yet. detail: why the oldest
one is not taken. next_attempt_at: when one of them is tried next.';

-- Why a partition's events may not be retired yet, in words; null when they may. It reads, and notes nothing, so it can
-- be a column of a view. The rules are those of outbox.why_kept, which is made of it below.
--
-- Unless `without_baseline`, it reads the partition's index once, and a few rows above it per aggregate, by index.
-- Otherwise it is a few rows by primary keys, and for each relay name its parked rows in the partition.
CREATE FUNCTION outbox.retention_blocker(partition text, older_than timestamptz, without_baseline boolean) RETURNS text
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
        SELECT a.aggregate_type, a.aggregate_id INTO blocker
        FROM (SELECT DISTINCT e.aggregate_type, e.aggregate_id FROM outbox.event e
              WHERE e.position BETWEEN from_pos AND to_pos) a
        WHERE NOT EXISTS (
                  SELECT FROM outbox.event n
                  WHERE n.aggregate_type = a.aggregate_type AND n.aggregate_id = a.aggregate_id
                    AND n.position > to_pos
                    AND (n.headers @> '{"baseline": true}' OR n.type = n.aggregate_type || '.deleted'))
          -- Deleted with its last event here: there is nothing left to learn.
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
REVOKE EXECUTE ON FUNCTION outbox.retention_blocker(text, timestamptz, boolean) FROM PUBLIC;

-- As before: why a partition is kept. It first notes since when the partition is full, where it is. The rest is
-- outbox.retention_blocker, which sees the note.
CREATE OR REPLACE FUNCTION outbox.why_kept(partition text, older_than timestamptz, without_baseline boolean) RETURNS text
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '100ms' AS $$
BEGIN
    INSERT INTO outbox.partition_age AS a (name, last_position)
    SELECT p.name, l.position
    FROM outbox.partition p
    CROSS JOIN LATERAL (SELECT CASE WHEN p.is_default THEN (SELECT max(e.position) FROM outbox.event_default e)
                                    ELSE p.upper - 1 END) AS l (position)
    WHERE p.name = why_kept.partition
      AND l.position <= (SELECT CASE WHEN m.is_called THEN m.last_value ELSE m.last_value - 1 END FROM outbox.position m)
    ON CONFLICT (name) DO UPDATE SET last_position = excluded.last_position, full_since = clock_timestamp()
    WHERE a.last_position <> excluded.last_position;
    RETURN outbox.retention_blocker(partition, older_than, without_baseline);
END
$$;

-- The partitions, and what keeps them.
--
--   first_position  one row, by the partition's primary key.
--   kept_because    outbox.retention_blocker, for an age of any length and without the search for baselines: cheap. The
--                   age is full_since, and `outbox-relay prune --dry-run` looks for baselines.
CREATE VIEW outbox.partition_status AS
SELECT p.name, p.lower, p.upper, p.is_default, a.full_since,
       CASE WHEN p.is_default THEN (SELECT min(e.position) FROM outbox.event_default e)
            ELSE (SELECT e.position FROM outbox.event e
                  WHERE e.position >= coalesce(p.lower, 0) AND e.position < coalesce(p.upper, 9223372036854775807)
                  ORDER BY e.position LIMIT 1) END AS first_position,
       outbox.retention_blocker(p.name, 'infinity', true) AS kept_because
FROM outbox.partition p
LEFT JOIN outbox.partition_age a ON a.name = p.name;
COMMENT ON VIEW outbox.partition_status IS
    'A row: a partition of outbox.event. lower up to, but without, upper: its positions; the default partition has neither.
full_since: when it was first seen full. first_position: of its first stored event, null when it has none. kept_because:
why its events may not be retired, whatever their age, and leaving baselines out; null when they may.';

-- The outbox as a whole.
--
--   used_position      one row of each partition by its primary key.
--   partitions_end     the catalog's partitions.
--   pending_erasures, oldest_erasure_at  outbox.erasure, which is empty but for a moment.
CREATE VIEW outbox.overview AS
SELECT s.name AS source, s.incarnation, s.since AS incarnation_since,
       l.position AS last_position,
       greatest((SELECT max(e.position) FROM outbox.event e),
                (SELECT max(greatest(r.low_water, r.high)) FROM outbox.relay r), 0) AS used_position,
       -- One range has the next position, or none has it.
       (SELECT CASE count(*) WHEN 0 THEN n.position ELSE min(upper(c.range)) END
        FROM (SELECT range_agg(int8range(p.lower, p.upper)) FROM outbox.partition p WHERE NOT p.is_default) AS a (ranges)
        CROSS JOIN LATERAL unnest(a.ranges) AS c (range)
        WHERE c.range @> n.position) AS partitions_end,
       (SELECT count(*) FROM outbox.erasure) AS pending_erasures,
       (SELECT min(r.asked_at) FROM outbox.erasure r) AS oldest_erasure_at
FROM (SELECT CASE WHEN p.is_called THEN p.last_value ELSE p.last_value - 1 END FROM outbox.position p) AS l (position)
-- A sequence that was set by hand may stand where numbers end.
CROSS JOIN LATERAL (SELECT least(l.position, 9223372036854775806) + 1) AS n (position)
LEFT JOIN outbox.source s ON true;
COMMENT ON VIEW outbox.overview IS
    'One row: the outbox. source, incarnation: who publishes from it; null before migrate gave it a name.
last_position: the last position handed out, from the sequence, which no snapshot contains. used_position: the highest
position that is stored or was read; above last_position, the sequence is behind. partitions_end: the first position after
the next one that has no partition of its own; null when there is none. pending_erasures, oldest_erasure_at: ended
aggregates that are still being erased, and when the first of them ended.';

COMMENT ON VIEW outbox.partition IS
    'A row: a partition of outbox.event, from the catalog. lower up to, but without, upper: its positions; the default
partition has neither.';
COMMENT ON VIEW outbox.readable IS
    'A row: an event as a subscriber may see it, with the erased form of what is being erased. For roles that may read
outbox.event.';
COMMENT ON VIEW outbox.readable_parked IS
    'A row: an event in outbox.parked as a subscriber may see it, with the erased form of what is being erased. For roles
that may read outbox.parked.';

-- What an operator's role needs to look, and no more: the views, and of the events what is no body and no header. With
-- these rights, status, trace, parked list and show, erasures and digest work.
CREATE FUNCTION outbox.grant_reader(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA outbox TO %s', role);
    EXECUTE format('GRANT SELECT ON outbox.source, outbox.migration, outbox.position, outbox.erasure, outbox.partition,'
                   ' outbox.overview, outbox.relay_status, outbox.leader_session, outbox.lock_holder,'
                   ' outbox.event_progress, outbox.parked_event, outbox.parked_group, outbox.waiting_group,'
                   ' outbox.partition_status TO %s', role);
    EXECUTE format('GRANT SELECT (position, id, aggregate_type, aggregate_id, version, type, created_at)'
                   ' ON outbox.event TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.leader_pid, outbox.retention_blocker TO %s', role);
END
$$;

-- What a relay, and who operates it, needs and no more: the rights of before, and what a reader has.
CREATE OR REPLACE FUNCTION outbox.grant_relay(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    PERFORM outbox.grant_reader(role);
    EXECUTE format('GRANT SELECT ON outbox.event, outbox.event_default TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE ON outbox.relay TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON outbox.parked, outbox.replay TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.add_partition, outbox.why_kept,'
                   ' outbox.retire_partition, outbox.drop_partition TO %s', role);
    EXECUTE format('GRANT SELECT ON outbox.readable, outbox.readable_parked TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.erase_step, outbox.try_lead, outbox.keep_erasures_out,'
                   ' outbox.keep_no_samples TO %s', role);
END
$$;
-- A role that relays already goes on to do so.
SELECT outbox.grant_relay(r.grantee::regrole)
FROM pg_class c, aclexplode(c.relacl) r
WHERE c.oid = 'outbox.parked'::regclass AND r.privilege_type = 'INSERT' AND r.grantee <> c.relowner;
