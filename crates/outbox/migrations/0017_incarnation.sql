-- An incarnation never recurs, and says which one it follows.
--
-- A database may go back in time: a backup is restored, or a standby is promoted that lacked the last commits. Then its
-- source goes on under a new incarnation. Until now that was the last one plus 1. But the same backup can be restored
-- twice, and a clone can be raised: both would have had the same number for two different histories. So a new
-- incarnation is a time, in milliseconds since 1970, above the last one. And it has a parent, the incarnation that it
-- follows: a subscriber goes on by itself when that is the newest one that it knows, and otherwise asks its operator.

-- What is dropped here is made again below: a column's type cannot change under a view.
DROP VIEW outbox.overview;

--   parent             the incarnation before, null for the first.
--   began_at_position  the last position handed out when the incarnation began. What has a higher one was written by
--                      somebody who knew the database as it is now, so a version 1 up there really starts a chain.
--                      Below it, a version 1 that was not published yet may have been published once, before the
--                      database went back.
--   server             where the database was when it was last known to have lost nothing: outbox.server().
ALTER TABLE outbox.source
    ALTER COLUMN incarnation TYPE bigint,
    ADD COLUMN parent bigint CHECK (parent BETWEEN 1 AND incarnation - 1),
    ADD COLUMN began_at_position bigint NOT NULL DEFAULT 0,
    ADD COLUMN server text;

-- Under which incarnation this relay name was led last. Null: it has not led since this column is there.
ALTER TABLE outbox.relay ADD COLUMN incarnation bigint;

-- Which database on which server this is: `<system identifier>/<timeline>/<database's OID>`. A restore into a new
-- database changes the OID, a restore of a whole server or a failover the timeline, and another server the identifier.
-- Where a provider lets nobody ask for the identifier, it is 0. One row of a shared catalog, and two looks into memory.
CREATE FUNCTION outbox.server() RETURNS text
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    identifier bigint;
    timeline   bigint;
BEGIN
    BEGIN
        SELECT s.system_identifier INTO identifier FROM pg_control_system() s;
    EXCEPTION WHEN insufficient_privilege OR feature_not_supported THEN
        identifier := 0;
    END;
    IF pg_is_in_recovery() THEN
        SELECT c.timeline_id INTO timeline FROM pg_control_checkpoint() c;
    ELSE
        -- The control file learns of a promotion only with the next checkpoint. The name of the file of the log that is
        -- being written begins with the timeline.
        timeline := ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::bigint;
    END IF;
    RETURN format('%s/%s/%s', identifier, timeline,
                  (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()));
END
$$;

-- An installation from before: its incarnations were counted. What it wrote before now starts no chain for certain.
UPDATE outbox.source SET
    parent = nullif(incarnation, 1) - 1,
    began_at_position = CASE incarnation WHEN 1 THEN 0
        ELSE (SELECT CASE WHEN p.is_called THEN p.last_value ELSE p.last_value - 1 END FROM outbox.position p) END,
    server = outbox.server();

-- Begins a new incarnation, above the present one, or above `above` where that is given. Who leads is deposed by its next
-- statement, since its epoch is not the stored one any more, and publishes under the new incarnation once it leads again.
-- An incarnation that nobody has led under yet, on this server, is kept: subscribers could not know it as a parent.
-- Runs with its caller's rights, who has to own the schema.
CREATE FUNCTION outbox.begin_incarnation(above bigint) RETURNS SETOF outbox.source
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    now_is outbox.source;
BEGIN
    SELECT * INTO STRICT now_is FROM outbox.source FOR UPDATE;
    IF now_is.incarnation > 1 AND now_is.parent = coalesce(above, now_is.parent) AND now_is.server = outbox.server()
       AND NOT EXISTS (SELECT FROM outbox.relay r WHERE r.incarnation = now_is.incarnation) THEN
        RETURN NEXT now_is;
        RETURN;
    END IF;
    -- What was settled above low_water was published as the earlier incarnation. It is published once more, so that all
    -- that lies above from_position is published as the new one.
    UPDATE outbox.relay SET epoch = epoch + 1, high = low_water, open = '{}';
    RETURN QUERY UPDATE outbox.source s SET
        incarnation = greatest((extract(epoch FROM clock_timestamp()) * 1000)::bigint, s.incarnation + 1, above + 1),
        parent = coalesce(above, s.incarnation),
        since = now(),
        -- What every relay has settled was published as an earlier incarnation only. What somebody has still to publish
        -- will be published under the new one.
        from_position = coalesce((SELECT min(r.low_water) FROM outbox.relay r), 0),
        began_at_position = (SELECT CASE WHEN p.is_called THEN p.last_value ELSE p.last_value - 1 END FROM outbox.position p),
        server = outbox.server()
    RETURNING s.*;
END
$$;
REVOKE EXECUTE ON FUNCTION outbox.begin_incarnation(bigint) FROM PUBLIC;

-- Of aggregates, given one array a column, those that the present incarnation knows nothing of: no event above
-- from_position is theirs. A row of each partition by its unique index for each. Runs with its caller's rights: whoever may
-- read outbox.event may ask.
CREATE FUNCTION outbox.not_begun(types text[], ids text[]) RETURNS TABLE (aggregate_type text, aggregate_id text)
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT k.aggregate_type, k.aggregate_id
    FROM unnest(types, ids) AS k (aggregate_type, aggregate_id)
    WHERE NOT EXISTS (SELECT FROM outbox.event e
                      WHERE (e.aggregate_type, e.aggregate_id) = (k.aggregate_type, k.aggregate_id)
                        AND e.position > (SELECT s.from_position FROM outbox.source s))
$$;

-- Ends aggregates that subscribers have, and that this database does not know in its present incarnation: writes
-- `<type>.deleted` for each, above the version that the subscriber has and above every version that is stored. Returns how
-- many. One that somebody has written an event of meanwhile is left alone. To be sure of that, the writers are kept out:
-- the lock is the one that outbox.next_position() takes, here for this transaction alone. So it waits for every open
-- writer, and writers wait for it: call it with few aggregates, and with a lock_timeout.
-- Runs with its caller's rights, who has to own the schema.
CREATE FUNCTION outbox.end_lost(types text[], ids text[], versions bigint[]) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    ended bigint;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'outbox.end_lost has to see what others commit while it waits: use READ COMMITTED'
            USING ERRCODE = 'invalid_transaction_state';
    END IF;
    PERFORM pg_advisory_xact_lock(1869968482, 1);
    -- A statement of its own, so its snapshot has all that the writers have committed.
    INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    SELECT k.aggregate_type, k.aggregate_id,
           greatest(k.version, (SELECT max(e.version) FROM outbox.event e
                                WHERE (e.aggregate_type, e.aggregate_id) = (k.aggregate_type, k.aggregate_id))) + 1,
           k.aggregate_type || '.deleted', json_build_object('id', k.aggregate_id)
    FROM unnest(types, ids, versions) AS k (aggregate_type, aggregate_id, version)
    JOIN outbox.not_begun(types, ids) USING (aggregate_type, aggregate_id)
    ORDER BY 1, 2;
    GET DIAGNOSTICS ended = ROW_COUNT;
    RETURN ended;
END
$$;
REVOKE EXECUTE ON FUNCTION outbox.end_lost(text[], text[], bigint[]) FROM PUBLIC;

-- How many aggregates lived when the present incarnation began, by the events from before it, and have no event of it yet:
-- each needs a baseline. One pass over the events. 0 in the first incarnation.
CREATE FUNCTION outbox.without_baseline() RETURNS bigint
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
    SELECT count(*) FROM (
        SELECT FROM outbox.event e
        WHERE (SELECT s.incarnation FROM outbox.source s) > 1
        GROUP BY e.aggregate_type, e.aggregate_id
        HAVING max(e.position) <= (SELECT s.from_position FROM outbox.source s)
           AND (array_agg(e.type ORDER BY e.position DESC))[1] <> e.aggregate_type || '.deleted') AS waiting
$$;

-- The outbox as a whole, as before, with the incarnation's parent, and with what is known of where it is.
--
--   used_position      one row of each partition by its primary key.
--   partitions_end     the catalog's partitions.
--   pending_erasures, oldest_erasure_at  outbox.erasure, which is empty but for a moment.
--   is_elsewhere       outbox.server().
CREATE VIEW outbox.overview AS
SELECT s.name AS source, s.incarnation, s.parent, s.since AS incarnation_since,
       l.position AS last_position,
       greatest((SELECT max(e.position) FROM outbox.event e),
                (SELECT max(greatest(r.low_water, r.high)) FROM outbox.relay r), 0) AS used_position,
       -- One range has the next position, or none has it.
       (SELECT CASE count(*) WHEN 0 THEN n.position ELSE min(upper(c.range)) END
        FROM (SELECT range_agg(int8range(p.lower, p.upper)) FROM outbox.partition p WHERE NOT p.is_default) AS a (ranges)
        CROSS JOIN LATERAL unnest(a.ranges) AS c (range)
        WHERE c.range @> n.position) AS partitions_end,
       (SELECT count(*) FROM outbox.erasure) AS pending_erasures,
       (SELECT min(r.asked_at) FROM outbox.erasure r) AS oldest_erasure_at,
       s.server <> outbox.server() AS is_elsewhere
FROM (SELECT CASE WHEN p.is_called THEN p.last_value ELSE p.last_value - 1 END FROM outbox.position p) AS l (position)
-- A sequence that was set by hand may stand where numbers end.
CROSS JOIN LATERAL (SELECT least(l.position, 9223372036854775806) + 1) AS n (position)
LEFT JOIN outbox.source s ON true;
COMMENT ON VIEW outbox.overview IS
    'One row: the outbox. source, incarnation, parent: who publishes from it, and which incarnation that one follows; null
before migrate gave it a name. last_position: the last position handed out, from the sequence, which no snapshot contains.
used_position: the highest position that is stored or was read; above last_position, the sequence is behind.
partitions_end: the first position after the next one that has no partition of its own; null when there is none.
pending_erasures, oldest_erasure_at: ended aggregates that are still being erased, and when the first of them ended.
is_elsewhere: the database is not where it was when it was last known to have lost nothing: another server, another
timeline of it (a failover, a restore of the server), or another database there (a restore). null: that is not known.';

-- The view was dropped with its rights. Who may read another view has them again.
SELECT outbox.grant_reader(r.grantee::regrole)
FROM pg_class c, aclexplode(c.relacl) r
WHERE c.oid = 'outbox.relay_status'::regclass AND r.privilege_type = 'SELECT' AND r.grantee <> c.relowner AND r.grantee <> 0;

-- Events that were written while the sequence stood behind: at positions that it had handed out before. Logical replication
-- and some restores do not carry a sequence, and somebody may set it back. Writers go on then, and fail wherever a position
-- is taken. What they write at a free one lies below what the relays have read, so no relay publishes it.
-- Empty while the sequence is not behind.
--
-- Such an event has a position that the sequence has passed again, and yet a later transaction than the events above that.
-- `xmin` tells that, and created_at does not: it is the writer's. Transactions overlap, so the last 1,000 events above are
-- looked at, and what began after the oldest of them counts: that may be a few more, which were published before.
-- Where nothing is stored above, nothing tells old from new, and everything counts.
--
--   since      positions below are left out.
--   is_latest  no other event of the aggregate follows it, so it can be published after all that is stored. Otherwise a
--              later version lies elsewhere: then it is one of those few more, or its writer began the chain again.
--
-- One pass over the events up to where the sequence stands. Runs with its caller's rights: whoever may read outbox.event
-- may ask.
CREATE FUNCTION outbox.reissued_event(since bigint) RETURNS TABLE (at_position bigint, is_latest boolean)
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp AS $$
    WITH mark AS MATERIALIZED (
        SELECT o.last_position AS at FROM outbox.overview o WHERE o.last_position < o.used_position),
    above AS MATERIALIZED (
        SELECT max(age(l.xmin)) AS age
        FROM (SELECT e.xmin FROM outbox.event e
              WHERE e.position > (SELECT m.at FROM mark m) ORDER BY e.position DESC LIMIT 1000) AS l),
    late AS (
        SELECT e.position, e.aggregate_type, e.aggregate_id, e.version FROM outbox.event e
        WHERE e.position BETWEEN since AND (SELECT m.at FROM mark m)
          AND age(e.xmin) < coalesce((SELECT a.age FROM above a), 2147483647))
    SELECT l.position, NOT EXISTS (
        SELECT FROM outbox.event o
        WHERE o.aggregate_type = l.aggregate_type AND o.aggregate_id = l.aggregate_id AND o.version >= l.version
          AND NOT (o.position BETWEEN since AND (SELECT m.at FROM mark m)
                   AND age(o.xmin) < coalesce((SELECT a.age FROM above a), 2147483647)))
    FROM late l
$$;

-- Sets a sequence that stands behind to the highest position in use, and gives the events of outbox.reissued_event that are
-- the latest of their aggregates positions above that, in their order. So the relays read them after everything that was
-- written before them, and publish them as any other event. Ids and versions stay. Changes nothing while the sequence is
-- not behind. Returns where the sequence stood, where it stands, and how many events were moved.
--
-- The writers are kept out by the lock that outbox.next_position() takes: call it with a lock_timeout. Who leads is deposed
-- by its next statement, and reads its progress again. Everything is of one transaction, the sequence too: ALTER SEQUENCE
-- is undone by a rollback, and setval is not.
-- Runs with its caller's rights, who has to own the schema.
CREATE FUNCTION outbox.mend_sequence(since bigint, OUT stood_at bigint, OUT stands_at bigint, OUT moved bigint)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    used     bigint;
    old_ones bigint[];
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'outbox.mend_sequence has to see what others commit while it waits: use READ COMMITTED'
            USING ERRCODE = 'invalid_transaction_state';
    END IF;
    PERFORM pg_advisory_xact_lock(1869968482, 1);
    SELECT o.last_position, o.last_position, o.used_position, 0 INTO stood_at, stands_at, used, moved FROM outbox.overview o;
    IF stood_at >= used THEN
        RETURN;
    END IF;
    UPDATE outbox.relay SET epoch = epoch + 1;
    old_ones := ARRAY(SELECT r.at_position FROM outbox.reissued_event(since) r WHERE r.is_latest ORDER BY 1);
    moved := cardinality(old_ones);
    stands_at := used + moved;
    -- What is being erased stays so: up_to is the last position that an erasure is about.
    UPDATE outbox.erasure r SET up_to = greatest(r.up_to, stands_at)
    WHERE EXISTS (SELECT FROM outbox.event e
                  WHERE e.position = ANY (old_ones) AND e.aggregate_type = r.aggregate_type
                    AND e.aggregate_id = r.aggregate_id AND e.version < r.below);
    UPDATE outbox.event e SET position = used + n.number
    FROM unnest(old_ones) WITH ORDINALITY AS n (at_position, number) WHERE e.position = n.at_position;
    -- A relay that has read one of them all the same, as a late one, and set it aside, finds its copy.
    UPDATE outbox.parked p SET position = used + n.number
    FROM unnest(old_ones) WITH ORDINALITY AS n (at_position, number) WHERE p.position = n.at_position;
    EXECUTE format('ALTER SEQUENCE outbox.position RESTART WITH %s', stands_at);
    -- As after any other position: it is handed out.
    PERFORM nextval('outbox.position');
END
$$;
REVOKE EXECUTE ON FUNCTION outbox.mend_sequence(bigint) FROM PUBLIC;
