-- Erasing what has a long history, in bounded steps; and locks that only those can take who need them.
--
-- Erasing costs a row update for each event. Of an aggregate with some hundred thousand events this takes longer
-- than any statement may, so nothing would be erased, however often it is tried. Therefore the transaction that
-- ends an aggregate erases its first events itself, which is all of them for most, and notes the rest here. What
-- is noted counts as erased from then on: outbox.readable and outbox.readable_parked, which the relay reads, show
-- the erased form. outbox.erase_step, which every running relay calls, then rewrites the rows step by step.

-- Erasures that are not complete. Normally empty.
--   below         the version of the aggregate's end: all earlier versions are erased.
--   up_to         the last position that was handed out when the aggregate ended. Should its key be used again
--                 with versions from 1, those events lie above it.
--   done_version  the rows up to this version are rewritten.
--   erased        how many events that were.
--   worked_at     when the last step ended: the next step goes to the aggregate that has waited longest.
CREATE TABLE outbox.erasure (
    id             bigint      PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    aggregate_type text        NOT NULL,
    aggregate_id   text        NOT NULL,
    below          bigint      NOT NULL,
    up_to          bigint      NOT NULL,
    done_version   bigint      NOT NULL DEFAULT 0,
    erased         bigint      NOT NULL DEFAULT 0,
    asked_at       timestamptz NOT NULL DEFAULT now(),
    worked_at      timestamptz,
    UNIQUE (aggregate_type, aggregate_id)
);
CREATE INDEX erasure_next ON outbox.erasure (worked_at NULLS FIRST, id);

-- Of an event's headers, the trace stays.
CREATE FUNCTION outbox.erased_headers(headers jsonb) RETURNS jsonb
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN pg_catalog.jsonb_strip_nulls(pg_catalog.jsonb_build_object('erased', true,
        'traceparent', pg_catalog.jsonb_extract_path_text(headers, 'traceparent')));

-- The events, each as a reader may see it. While no erasure is under way this is outbox.event: whether there is one
-- is asked once for each statement, and never for each row.
CREATE VIEW outbox.readable WITH (security_invoker = true) AS
SELECT e.position, e.id, e.aggregate_type, e.aggregate_id, e.version, e.type,
       CASE WHEN (SELECT EXISTS (SELECT FROM outbox.erasure)) AND EXISTS (
                SELECT FROM outbox.erasure r
                WHERE r.aggregate_type = e.aggregate_type AND r.aggregate_id = e.aggregate_id
                  AND e.version < r.below AND e.position <= r.up_to)
            THEN outbox.erased(e.payload, e.aggregate_id) ELSE e.payload END AS payload,
       CASE WHEN (SELECT EXISTS (SELECT FROM outbox.erasure)) AND EXISTS (
                SELECT FROM outbox.erasure r
                WHERE r.aggregate_type = e.aggregate_type AND r.aggregate_id = e.aggregate_id
                  AND e.version < r.below AND e.position <= r.up_to)
            THEN outbox.erased_headers(e.headers) ELSE e.headers END AS headers,
       e.created_at
FROM outbox.event e;

-- The same of what is set aside.
CREATE VIEW outbox.readable_parked WITH (security_invoker = true) AS
SELECT p.relay, p.position, p.id, p.aggregate_type, p.aggregate_id, p.version, p.type,
       CASE WHEN (SELECT EXISTS (SELECT FROM outbox.erasure)) AND EXISTS (
                SELECT FROM outbox.erasure r
                WHERE r.aggregate_type = p.aggregate_type AND r.aggregate_id = p.aggregate_id
                  AND p.version < r.below AND p.position <= r.up_to) AND p.payload IS NOT NULL
            THEN outbox.erased(p.payload, p.aggregate_id) ELSE p.payload END AS payload,
       CASE WHEN (SELECT EXISTS (SELECT FROM outbox.erasure)) AND EXISTS (
                SELECT FROM outbox.erasure r
                WHERE r.aggregate_type = p.aggregate_type AND r.aggregate_id = p.aggregate_id
                  AND p.version < r.below AND p.position <= r.up_to)
            THEN outbox.erased_headers(p.headers) ELSE p.headers END AS headers,
       p.created_at
FROM outbox.parked p;

-- Rewrites the next events of an aggregate: those of `most` versions after `after_version`, and no more than about
-- a megabyte of bodies as they are stored, but at least one version. `last_version` is null when there were none.
--
-- A range of versions bounds it, not a LIMIT: the range is found by the partitions' index whatever the server
-- believes about the number of events. For its callers here; nobody is granted it.
CREATE FUNCTION outbox.erase_events(of_type text, of_id text, after_version bigint, below bigint, up_to bigint,
                                    most bigint, OUT erased bigint, OUT last_version bigint)
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
    SET enable_seqscan = off AS $$
DECLARE
    first_version bigint;
    positions     bigint[];
BEGIN
    erased := 0;
    SELECT e.version INTO first_version FROM outbox.event e
    WHERE e.aggregate_type = of_type AND e.aggregate_id = of_id
      AND e.version > after_version AND e.version < erase_events.below
    ORDER BY e.version LIMIT 1;
    IF first_version IS NULL THEN
        RETURN;
    END IF;
    SELECT max(s.version), array_agg(s.position) FILTER (WHERE s.position <= erase_events.up_to AND NOT s.done)
    INTO last_version, positions
    FROM (SELECT e.version, e.position, coalesce(e.headers @> '{"erased": true}', false) AS done,
                 sum(pg_column_size(e.payload)) OVER (ORDER BY e.version RANGE BETWEEN UNBOUNDED PRECEDING
                                                                                    AND 1 PRECEDING) AS before
          FROM outbox.event e
          WHERE e.aggregate_type = of_type AND e.aggregate_id = of_id
            AND e.version >= first_version
            AND e.version < first_version + least(erase_events.below - first_version, greatest(most, 1))) AS s
    WHERE coalesce(s.before, 0) < 1048576;
    -- A time that no check would accept today must not keep a row from being erased.
    UPDATE outbox.event e
    SET payload = outbox.erased(e.payload, e.aggregate_id), headers = outbox.erased_headers(e.headers),
        created_at = least(greatest(e.created_at, '0001-01-01 00:00:00+00'), '9999-12-31 23:59:59+00')
    WHERE e.position = ANY (positions);
    GET DIAGNOSTICS erased = ROW_COUNT;
END
$$;

-- The same of what is set aside of it; whether there may be more. A relay that sets an event aside meanwhile copies
-- the erased form, so what is left becomes less.
CREATE FUNCTION outbox.erase_parked(of_type text, of_id text, below bigint, up_to bigint, most bigint)
    RETURNS boolean
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
    SET enable_seqscan = off AS $$
DECLARE
    n bigint;
BEGIN
    UPDATE outbox.parked p
    SET payload = CASE WHEN p.payload IS NOT NULL THEN outbox.erased(p.payload, p.aggregate_id) END,
        headers = '{"erased": true}'
    WHERE p.ctid = ANY (ARRAY(
        SELECT k.ctid FROM outbox.parked k
        WHERE k.aggregate_type = of_type AND k.aggregate_id = of_id AND k.version < erase_parked.below
          AND k.position <= erase_parked.up_to AND (k.payload IS NOT NULL OR k.headers IS NOT NULL)
          AND NOT coalesce(k.headers @> '{"erased": true}', false)
        ORDER BY k.relay, k.position LIMIT greatest(most, 1) FOR UPDATE));
    GET DIAGNOSTICS n = ROW_COUNT;
    RETURN n >= greatest(most, 1);
END
$$;
REVOKE EXECUTE ON FUNCTION outbox.erase_events(text, text, bigint, bigint, bigint, bigint),
                           outbox.erase_parked(text, text, bigint, bigint, bigint) FROM PUBLIC;

-- As before: erases the content of aggregates, of each its events below a version. Of all of them together it
-- rewrites at most 2,000 versions now; what is left is noted, reads as erased from the commit on, and is rewritten by
-- the relay. Returns how many events were rewritten now.
--
-- The rows of erasures under way are locked first: a step locks in this order, too.
CREATE OR REPLACE FUNCTION outbox.erase(types text[], ids text[], below bigint[]) RETURNS bigint
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    ended   record;
    step    record;
    last    bigint;
    mark    bigint;
    done    bigint;
    left_of bigint := 2000;
    aside   boolean;
    erased  bigint := 0;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(1869968482, 3);
    PERFORM FROM outbox.erasure r JOIN unnest(types, ids) AS e (type, id) ON (e.type, e.id) = (r.aggregate_type, r.aggregate_id)
    ORDER BY r.id FOR UPDATE OF r;
    SELECT p.last_value INTO mark FROM outbox.position p;
    FOR ended IN
        SELECT e.type, e.id, e.version FROM unnest(types, ids, below) AS e (type, id, version) ORDER BY 1, 2
    LOOP
        last := 0;
        done := 0;
        LOOP
            EXIT WHEN left_of <= 0;
            SELECT * INTO step FROM outbox.erase_events(ended.type, ended.id, last, ended.version, mark, left_of);
            EXIT WHEN step.last_version IS NULL;
            left_of := left_of - greatest(step.erased, 1);
            last := step.last_version;
            done := done + step.erased;
        END LOOP;
        aside := outbox.erase_parked(ended.type, ended.id, ended.version, mark, greatest(left_of, 100));
        erased := erased + done;
        IF aside OR EXISTS (SELECT FROM outbox.event e
                            WHERE e.aggregate_type = ended.type AND e.aggregate_id = ended.id
                              AND e.version > last AND e.version < ended.version) THEN
            INSERT INTO outbox.erasure AS r (aggregate_type, aggregate_id, below, up_to, done_version, erased)
            VALUES (ended.type, ended.id, ended.version, mark, last, done)
            ON CONFLICT (aggregate_type, aggregate_id) DO UPDATE
            SET below = greatest(r.below, excluded.below), up_to = greatest(r.up_to, excluded.up_to),
                done_version = least(r.done_version, excluded.done_version), erased = r.erased + excluded.erased;
        END IF;
    END LOOP;
    RETURN erased;
END
$$;

-- One step of the erasure that has waited longest: at most `most` versions, in the caller's transaction. Returns no
-- row when there is nothing to do, or when others are at all there is. Whoever is killed in a step has done nothing.
CREATE FUNCTION outbox.erase_step(most bigint)
    RETURNS TABLE (aggregate_type text, aggregate_id text, erased bigint, finished boolean)
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    work outbox.erasure%ROWTYPE;
    step record;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(1869968482, 3);
    SELECT * INTO work FROM outbox.erasure r ORDER BY r.worked_at NULLS FIRST, r.id LIMIT 1 FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    SELECT * INTO step
    FROM outbox.erase_events(work.aggregate_type, work.aggregate_id, work.done_version, work.below, work.up_to, most);
    aggregate_type := work.aggregate_type;
    aggregate_id := work.aggregate_id;
    erased := step.erased;
    finished := step.last_version IS NULL
                AND NOT outbox.erase_parked(work.aggregate_type, work.aggregate_id, work.below, work.up_to, most);
    IF finished THEN
        DELETE FROM outbox.erasure r WHERE r.id = work.id;
    ELSE
        UPDATE outbox.erasure r
        SET done_version = coalesce(step.last_version, r.done_version), erased = r.erased + step.erased,
            worked_at = clock_timestamp()
        WHERE r.id = work.id;
    END IF;
    RETURN NEXT;
END
$$;

-- Advisory locks. Any session that can connect can take any of them, and with them stop all writers of this
-- database: the functions that take them are everybody's. deploy/permissions/roles.sql takes them from everybody,
-- where it may; the programs' roles get these, each of which takes one lock only.

-- Leadership of the relay with this id, until the session ends; false when another session has it.
CREATE FUNCTION outbox.try_lead(relay integer) RETURNS boolean
    LANGUAGE sql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS $$ SELECT pg_try_advisory_lock(1869968492, relay) $$;

-- Keeps erasures out until the end of the transaction.
CREATE FUNCTION outbox.keep_erasures_out() RETURNS void
    LANGUAGE sql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS $$ SELECT pg_advisory_xact_lock(1869968482, 3) $$;

REVOKE EXECUTE ON FUNCTION outbox.erase_step(bigint), outbox.try_lead(integer), outbox.keep_erasures_out() FROM PUBLIC;

-- Samples. ANALYZE keeps values of a table's rows in pg_statistic, where they outlive the rows, and an erasure. Of
-- columns that may hold something personal it must keep none: their statistics target is 0. (Of the type json it keeps
-- no values in any case.) A new partition begins without this, and the relay's look at partitions sets it.
CREATE FUNCTION outbox.keep_no_samples() RETURNS void
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '100ms' AS $$
DECLARE
    wanted record;
BEGIN
    FOR wanted IN
        SELECT c.oid::regclass AS relation, a.attname
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
        WHERE (c.oid = 'outbox.parked'::regclass
               OR c.oid IN (SELECT t.relid FROM pg_partition_tree('outbox.event') t))
          AND a.attname IN ('payload', 'headers', 'detail') AND NOT a.attisdropped
          AND a.attstattarget IS DISTINCT FROM 0
    LOOP
        EXECUTE format('ALTER TABLE ONLY %s ALTER COLUMN %I SET STATISTICS 0', wanted.relation, wanted.attname);
    END LOOP;
END
$$;
REVOKE EXECUTE ON FUNCTION outbox.keep_no_samples() FROM PUBLIC;
SELECT outbox.keep_no_samples();
-- What was sampled before. Only a superuser may; roles.sql does the same.
DO $$
BEGIN
    IF current_setting('is_superuser')::boolean THEN
        DELETE FROM pg_catalog.pg_statistic s USING pg_catalog.pg_attribute a
        WHERE a.attrelid = s.starelid AND a.attnum = s.staattnum AND a.attstattarget = 0
          AND a.attrelid IN (SELECT c.oid FROM pg_catalog.pg_class c WHERE c.relnamespace = 'outbox'::regnamespace);
    END IF;
END
$$;

-- What a relay, and whoever operates it, needs and no more: the rights of before, and this.
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
    EXECUTE format('GRANT SELECT ON outbox.erasure, outbox.readable, outbox.readable_parked TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.erase_step, outbox.try_lead, outbox.keep_erasures_out,'
                   ' outbox.keep_no_samples TO %s', role);
END
$$;
-- Whoever relays already goes on to do so.
SELECT outbox.grant_relay(r.grantee::regrole)
FROM pg_class c, aclexplode(c.relacl) r
WHERE c.oid = 'outbox.parked'::regclass AND r.privilege_type = 'INSERT' AND r.grantee <> c.relowner;
