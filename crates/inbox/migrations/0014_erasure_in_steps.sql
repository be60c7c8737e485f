-- Erasing what is held or rejected of an aggregate, in bounded steps; and no samples of it.
--
-- Of an aggregate of which very much is held, inbox.erase took longer than a statement may (57 s for 300,000 rows). So
-- the transaction that applies the end erases a bounded number of rows, and notes the aggregate where some are left.
-- Whoever consumes calls inbox.erase_step until nothing is noted.
SET LOCAL lock_timeout = '2s';
CREATE TABLE inbox.erasure (
    source         text        NOT NULL,
    aggregate_type text        NOT NULL,
    aggregate_id   text        NOT NULL,
    version        bigint      NOT NULL,
    asked_at       timestamptz NOT NULL DEFAULT now(),
    worked_at      timestamptz,
    PRIMARY KEY (source, aggregate_type, aggregate_id)
);
CREATE INDEX erasure_next ON inbox.erasure (worked_at NULLS FIRST, asked_at);

-- Which rows have been erased, so that a step finds the others by an index, however many there are.
ALTER TABLE inbox.held ADD COLUMN erased boolean NOT NULL DEFAULT false;
CREATE INDEX held_not_erased ON inbox.held (aggregate_id) WHERE NOT erased;
DROP INDEX inbox.held_aggregate;

-- What is held and not erased of aggregates that ended, at most so many rows. What is held above their end stays.
CREATE FUNCTION inbox.held_of_ended(sources text[], types text[], ids text[], versions bigint[], most integer)
    RETURNS SETOF tid
    LANGUAGE sql STABLE
    SET enable_seqscan = off AS $$
    SELECT h.ctid FROM inbox.held h
    WHERE h.aggregate_id = ANY (ids) AND NOT h.erased
      AND EXISTS (SELECT FROM unnest(sources, types, ids, versions) AS ended (source, of_type, id, version)
                  WHERE (ended.of_type, ended.id) = (h.aggregate_type, h.aggregate_id)
                    AND split_part(ended.source, '~', 1) = split_part(h.source, '~', 1)
                    AND (inbox.incarnation(h.source), h.version) <= (inbox.incarnation(ended.source), ended.version))
    LIMIT most
$$;

-- Erases some of it, at most `most` held and as many rejected rows. Returns how many, and whether any are left.
-- What another transaction has locked is left: that one is about to remove it, or a later step comes by.
CREATE FUNCTION inbox.erase_some(sources text[], types text[], ids text[], versions bigint[], most integer,
                                 OUT rows bigint, OUT more boolean)
    LANGUAGE plpgsql
    SET enable_seqscan = off AS $$
DECLARE
    n bigint;
BEGIN
    UPDATE inbox.held h
    SET headers = '{"erased":true}', erased = true,
        payload = convert_to('{"id":' || to_json(h.aggregate_id) || ',"erased":true}', 'UTF8')
    WHERE h.ctid = ANY (ARRAY(
        SELECT l.ctid FROM inbox.held l
        WHERE l.ctid = ANY (ARRAY(SELECT inbox.held_of_ended(sources, types, ids, versions, most)))
        FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS rows = ROW_COUNT;
    UPDATE inbox.rejected r
    SET properties = '{}', body = '', about = '{}', erased_at = now()
    WHERE r.id = ANY (ARRAY(SELECT l.id FROM inbox.rejected l WHERE l.about && ids LIMIT most FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS n = ROW_COUNT;
    rows := rows + n;
    more := EXISTS (SELECT FROM inbox.held_of_ended(sources, types, ids, versions, 1))
            OR EXISTS (SELECT FROM inbox.rejected r WHERE r.about && ids);
END
$$;

-- As before, but bounded: what is left is noted. Call it after the transaction has removed what it removes itself.
CREATE OR REPLACE FUNCTION inbox.erase(sources text[], types text[], ids text[], versions bigint[]) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    IF (SELECT more FROM inbox.erase_some(sources, types, ids, versions, 1000)) THEN
        INSERT INTO inbox.erasure AS e (source, aggregate_type, aggregate_id, version)
        SELECT DISTINCT ON (1, 2, 3) n.source, n.of_type, n.id, n.version
        FROM unnest(sources, types, ids, versions) AS n (source, of_type, id, version)
        ORDER BY 1, 2, 3, 4 DESC
        ON CONFLICT (source, aggregate_type, aggregate_id) DO UPDATE
        SET version = greatest(e.version, excluded.version);
    END IF;
END
$$;

-- One step of what has waited longest; how many rows that was. Null when nothing is noted, or others are at all of it.
CREATE FUNCTION inbox.erase_step(most integer) RETURNS bigint
    LANGUAGE plpgsql AS $$
DECLARE
    work inbox.erasure%ROWTYPE;
    step record;
BEGIN
    SELECT * INTO work FROM inbox.erasure e ORDER BY e.worked_at NULLS FIRST, e.asked_at LIMIT 1 FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    SELECT * INTO step FROM inbox.erase_some(ARRAY[work.source], ARRAY[work.aggregate_type], ARRAY[work.aggregate_id],
                                             ARRAY[work.version], most);
    IF step.more THEN
        UPDATE inbox.erasure e SET worked_at = clock_timestamp()
        WHERE (e.source, e.aggregate_type, e.aggregate_id) = (work.source, work.aggregate_type, work.aggregate_id);
    ELSE
        DELETE FROM inbox.erasure e
        WHERE (e.source, e.aggregate_type, e.aggregate_id) = (work.source, work.aggregate_type, work.aggregate_id);
    END IF;
    RETURN step.rows;
END
$$;

-- Of these columns ANALYZE keeps no samples: they would outlive the rows. (Of the type json it keeps none in any case.)
ALTER TABLE inbox.held ALTER COLUMN payload SET STATISTICS 0;
ALTER TABLE inbox.held ALTER COLUMN error SET STATISTICS 0;
ALTER TABLE inbox.rejected ALTER COLUMN detail SET STATISTICS 0;
ALTER TABLE inbox.rejected ALTER COLUMN body SET STATISTICS 0;
ALTER TABLE inbox.rejected ALTER COLUMN about SET STATISTICS 0;
ALTER TABLE inbox.skipped ALTER COLUMN error SET STATISTICS 0;
-- What was sampled before. Only a superuser may; roles.sql does the same.
DO $$
BEGIN
    IF current_setting('is_superuser')::boolean THEN
        DELETE FROM pg_catalog.pg_statistic s USING pg_catalog.pg_attribute a
        WHERE a.attrelid = s.starelid AND a.attnum = s.staattnum AND a.attstattarget = 0
          AND a.attrelid IN (SELECT c.oid FROM pg_catalog.pg_class c WHERE c.relnamespace = 'inbox'::regnamespace);
    END IF;
END
$$;

-- What a consumer needs and no more: the rights of before, and to note what is still to be erased.
CREATE OR REPLACE FUNCTION inbox.grant_consumer(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA inbox TO %s', role);
    EXECUTE format('GRANT SELECT ON inbox.migration TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON inbox.aggregate, inbox.held, inbox.rejected, inbox.erasure'
                   ' TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT ON inbox.skipped TO %s', role);
END
$$;
-- Whoever consumes already goes on to do so.
SELECT inbox.grant_consumer(r.grantee::regrole)
FROM pg_class c, aclexplode(c.relacl) r
WHERE c.oid = 'inbox.held'::regclass AND r.privilege_type = 'INSERT' AND r.grantee <> c.relowner;
