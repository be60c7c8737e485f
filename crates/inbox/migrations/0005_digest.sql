-- Comparing: does a consumer have what its source published?
--
-- The counterpart of outbox.digest, made in the same way: equal rows mean equal contents. These functions
-- run with their caller's rights: whoever may read inbox.aggregate may call them.

-- SHA-256 of the id's UTF-8, of which a bucket takes the first 4 bytes as a number, modulo their count.
CREATE FUNCTION inbox.digest_bucket(aggregate_id text, buckets integer) RETURNS integer
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT (('x' || encode(substr(sha256(convert_to(aggregate_id, 'UTF8')), 1, 4), 'hex'))::bit(32)::bigint
            % buckets)::integer
$$;

-- The first 8 bytes of the SHA-256 of `<aggregate id>/<version>`, as a number. Combined by bit_xor.
CREATE FUNCTION inbox.digest_hash(aggregate_id text, version bigint) RETURNS bigint
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT ('x' || encode(substr(sha256(convert_to(aggregate_id || '/' || version, 'UTF8')), 1, 8), 'hex'))::bit(64)::bigint
$$;

-- What a consumer has applied of a source, per aggregate type and bucket (0 to buckets - 1). `versions` is the
-- sum of the last ones. An aggregate of which nothing was applied yet does not count, but its type is there.
-- One pass over the consumer's rows.
CREATE FUNCTION inbox.digest(of_consumer text, of_source text, buckets integer)
    RETURNS TABLE (aggregate_type text, bucket integer, aggregates bigint, versions bigint, hash bigint)
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT a.aggregate_type, inbox.digest_bucket(a.aggregate_id, buckets),
           count(*) FILTER (WHERE a.version > 0), sum(a.version)::bigint,
           coalesce(bit_xor(inbox.digest_hash(a.aggregate_id, a.version)) FILTER (WHERE a.version > 0), 0)
    FROM inbox.aggregate a
    WHERE a.consumer = of_consumer AND a.source = of_source
    GROUP BY 1, 2
$$;

-- The aggregates of some buckets, in the order of their ids' bytes, which is the same everywhere.
CREATE FUNCTION inbox.digest_list(of_consumer text, of_source text, of_type text, buckets integer, chosen integer[])
    RETURNS TABLE (aggregate_id text, version bigint)
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT a.aggregate_id, a.version FROM inbox.aggregate a
    WHERE a.consumer = of_consumer AND a.source = of_source AND a.aggregate_type = of_type AND a.version > 0
      AND inbox.digest_bucket(a.aggregate_id, buckets) = ANY (chosen)
    ORDER BY convert_to(a.aggregate_id, 'UTF8')
$$;

-- Who consumes what here. By the key, from each pair straight to the next.
CREATE FUNCTION inbox.sources() RETURNS TABLE (consumer text, source text)
    LANGUAGE sql STABLE AS $$
    WITH RECURSIVE known AS (
        (SELECT a.consumer, a.source FROM inbox.aggregate a ORDER BY 1, 2 LIMIT 1)
        UNION ALL
        SELECT next.consumer, next.source
        FROM known k
        CROSS JOIN LATERAL (SELECT a.consumer, a.source FROM inbox.aggregate a
                            WHERE (a.consumer, a.source) > (k.consumer, k.source) ORDER BY 1, 2 LIMIT 1) next)
    SELECT k.consumer, k.source FROM known k
$$;
