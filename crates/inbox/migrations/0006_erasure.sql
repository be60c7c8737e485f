-- Erasure: of an aggregate that has ended, nothing stays but that it was.

-- A message that is no event belongs to no aggregate, but it may tell of one. `about` is what it names: the
-- aggregate in its headers, and every UUID in its properties and its body, in small letters; by it, it is found
-- when one of them ends. Its body and its properties go then; reason, times and digest stay.
ALTER TABLE inbox.rejected ADD COLUMN about text[] NOT NULL DEFAULT '{}';
ALTER TABLE inbox.rejected ADD COLUMN erased_at timestamptz;
UPDATE inbox.rejected SET about = ARRAY(
    SELECT properties #>> '{headers,aggregate_id}' WHERE properties #> '{headers,aggregate_id}' IS NOT NULL
    UNION
    -- Bytes that are no ASCII are escaped, and no UUID has any.
    SELECT lower(uuid[1])
    FROM regexp_matches(properties::text || encode(body, 'escape'),
                        '[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}', 'g') uuid);
CREATE INDEX rejected_about ON inbox.rejected USING gin (about);

-- Finds what is held of an aggregate whoever holds it and whoever published it: the key begins with both.
CREATE INDEX held_aggregate ON inbox.held (aggregate_id);

-- Which incarnation of its publisher a source is: 1 for `person`, 2 for `person~2`.
CREATE FUNCTION inbox.incarnation(source text) RETURNS bigint
    LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT coalesce(substring(source FROM '~([0-9]{1,18})$')::bigint, 1)
$$;

-- Erases the content of what is held or rejected of aggregates that have ended, one source, type, id and
-- version for each: the version of its end. What is held above that, should the aggregate go on, stays.
--
-- It concerns every consumer in this database and earlier incarnations of the source: also a consumer that was
-- replaced, whose copies nobody would come by any more. A held event keeps its place, in the erased form that
-- the contract gives it. Call it before the transaction removes or stores anything itself, so that of two
-- consumers that hear of the same end at once neither waits for the other in a circle: both lock all rows
-- here, in the order of their keys.
CREATE FUNCTION inbox.erase(sources text[], types text[], ids text[], versions bigint[]) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    WITH found AS MATERIALIZED (
        SELECT h.consumer, h.source, h.aggregate_type, h.aggregate_id, h.version
        FROM inbox.held h
        WHERE h.aggregate_id = ANY (ids)
          AND EXISTS (SELECT FROM unnest(sources, types, ids, versions) AS ended (source, of_type, id, version)
                      WHERE (ended.of_type, ended.id) = (h.aggregate_type, h.aggregate_id)
                        AND split_part(ended.source, '~', 1) = split_part(h.source, '~', 1)
                        AND (inbox.incarnation(h.source), h.version)
                            <= (inbox.incarnation(ended.source), ended.version))
        ORDER BY h.consumer, h.source, h.aggregate_type, h.aggregate_id, h.version
        FOR UPDATE
    )
    UPDATE inbox.held h
    SET headers = '{"erased":true}',
        payload = convert_to('{"id":' || to_json(h.aggregate_id) || ',"erased":true}', 'UTF8')
    FROM found
    WHERE (h.consumer, h.source, h.aggregate_type, h.aggregate_id, h.version)
        = (found.consumer, found.source, found.aggregate_type, found.aggregate_id, found.version);

    WITH found AS MATERIALIZED (
        SELECT r.id FROM inbox.rejected r
        WHERE r.about && ids
        ORDER BY r.consumer, r.digest
        FOR UPDATE
    )
    UPDATE inbox.rejected r
    SET properties = '{}', body = '', about = '{}', erased_at = now()
    FROM found
    WHERE r.id = found.id;
END
$$;
