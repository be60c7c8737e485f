-- Erasure: the content of events goes, their places stay.

-- The form that the contract gives an event whose content is gone: the record's own id, and nothing else.
CREATE FUNCTION outbox.erased(payload json, aggregate_id text) RETURNS json
    LANGUAGE plpgsql IMMUTABLE
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    id json := to_json(aggregate_id);
BEGIN
    BEGIN
        IF json_typeof(payload -> 'id') = 'string' THEN
            id := payload -> 'id';
        END IF;
    EXCEPTION WHEN untranslatable_character THEN
        -- A body may hold "\u0000", which PostgreSQL can store but not read.
        NULL;
    END;
    RETURN '{"id":' || id || ',"erased":true}';
END
$$;

-- Erases the content of aggregates: of each, of its events below a version, published or not, and of the
-- copies of them that are set aside. Position, id, version, type and time stay, so that chains have no
-- holes; of the headers, the trace. Returns how many events it were.
--
-- Call it in the transaction that ends the aggregates, once their rows are locked and in a statement after
-- that: one statement sees what was committed when it began, and would leave what a writer, for whom it
-- waited, has just appended.
--
-- A relay that has read an event already still publishes it as it was. It takes a copy of an event that it
-- sets aside from here, never from its memory, and keeps erasures out meanwhile by the lock of this class with
-- key 3: whichever comes first, no copy survives. Erasures share that lock, and do not wait for each other.
--
-- One index lookup a partition and aggregate. Runs with its owner's rights: a writer may erase, and not read.
CREATE FUNCTION outbox.erase(types text[], ids text[], below bigint[]) RETURNS bigint
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    ended  record;
    n      bigint;
    erased bigint := 0;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(1869968482, 3);
    FOR ended IN
        SELECT e.type, e.id, e.version FROM unnest(types, ids, below) AS e (type, id, version) ORDER BY 1, 2
    LOOP
        UPDATE outbox.event
        SET payload = outbox.erased(event.payload, event.aggregate_id),
            headers = jsonb_build_object('erased', true)
                      || coalesce((SELECT jsonb_object_agg(h.key, h.value) FROM jsonb_each(event.headers) AS h
                                   WHERE h.key = 'traceparent'), '{}')
        WHERE event.aggregate_type = ended.type AND event.aggregate_id = ended.id
          AND event.version < ended.version AND NOT coalesce(event.headers @> '{"erased": true}', false);
        GET DIAGNOSTICS n = ROW_COUNT;
        erased := erased + n;
        UPDATE outbox.parked
        SET payload = outbox.erased(parked.payload, parked.aggregate_id), headers = '{"erased": true}'
        WHERE parked.aggregate_type = ended.type AND parked.aggregate_id = ended.id
          AND parked.version < ended.version;
    END LOOP;
    RETURN erased;
END
$$;
REVOKE EXECUTE ON FUNCTION outbox.erase(text[], text[], bigint[]) FROM PUBLIC;

-- What a writer needs and no more: the rights of before, and to erase.
CREATE OR REPLACE FUNCTION outbox.grant_writer(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA outbox TO %s', role);
    EXECUTE format('GRANT SELECT ON outbox.source, outbox.migration TO %s', role);
    EXECUTE format('GRANT SELECT (position), INSERT (id, aggregate_type, aggregate_id, version, type,'
                   ' payload, headers, created_at) ON outbox.event TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.erase(text[], text[], bigint[]) TO %s', role);
END
$$;
-- Whoever appends already goes on to do so.
SELECT outbox.grant_writer(r.grantee::regrole)
FROM pg_attribute a, aclexplode(a.attacl) r
WHERE a.attrelid = 'outbox.event'::regclass AND a.attname = 'payload' AND r.privilege_type = 'INSERT';
