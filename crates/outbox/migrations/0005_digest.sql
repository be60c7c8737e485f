-- Comparing: does a subscriber have what was published?
--
-- A subscriber that keeps an inbox knows the last version of each aggregate, and so does the outbox. A
-- digest sums either up in a few rows: aggregates, their versions, and a hash of both that depends neither
-- on order nor on the server. inbox.digest is made in the same way, so equal rows mean equal contents.
-- These functions run with their caller's rights: whoever may read outbox.event may call them.

-- Where the chains of the current incarnation begin: what lies at or below was published under the source's
-- earlier name only. `outbox-relay new-incarnation` sets it to what every relay had settled by then.
ALTER TABLE outbox.source ADD COLUMN from_position bigint NOT NULL DEFAULT 0;

-- SHA-256 of the id's UTF-8, of which a bucket takes the first 4 bytes as a number, modulo their count.
CREATE FUNCTION outbox.digest_bucket(aggregate_id text, buckets integer) RETURNS integer
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT (('x' || encode(substr(sha256(convert_to(aggregate_id, 'UTF8')), 1, 4), 'hex'))::bit(32)::bigint
            % buckets)::integer
$$;

-- The first 8 bytes of the SHA-256 of `<aggregate id>/<version>`, as a number. Combined by bit_xor.
CREATE FUNCTION outbox.digest_hash(aggregate_id text, version bigint) RETURNS bigint
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT ('x' || encode(substr(sha256(convert_to(aggregate_id || '/' || version, 'UTF8')), 1, 8), 'hex'))::bit(64)::bigint
$$;

-- The last version of each aggregate in the current incarnation, published or not. Erased events count, and
-- of aggregates whose events were all retired nothing is known any more. One pass over the events: over
-- the partitions' unique indexes alone while the incarnation is the first.
CREATE FUNCTION outbox.last_version() RETURNS TABLE (aggregate_type text, aggregate_id text, version bigint)
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT e.aggregate_type, e.aggregate_id, max(e.version) FROM outbox.event e
    WHERE (SELECT s.from_position FROM outbox.source s) = 0
    GROUP BY 1, 2
    UNION ALL
    SELECT e.aggregate_type, e.aggregate_id, max(e.version) FROM outbox.event e
    WHERE (SELECT s.from_position FROM outbox.source s) > 0
      AND e.position > (SELECT s.from_position FROM outbox.source s)
    GROUP BY 1, 2
$$;

-- What the outbox has, per aggregate type and bucket (0 to buckets - 1). `versions` is the sum of the last ones.
CREATE FUNCTION outbox.digest(buckets integer)
    RETURNS TABLE (aggregate_type text, bucket integer, aggregates bigint, versions bigint, hash bigint)
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT l.aggregate_type, outbox.digest_bucket(l.aggregate_id, buckets),
           count(*), sum(l.version)::bigint, bit_xor(outbox.digest_hash(l.aggregate_id, l.version))
    FROM outbox.last_version() l
    GROUP BY 1, 2
$$;

-- The aggregates of some buckets, in the order of their ids' bytes, which is the same everywhere.
CREATE FUNCTION outbox.digest_list(of_type text, buckets integer, chosen integer[])
    RETURNS TABLE (aggregate_id text, version bigint)
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT l.aggregate_id, l.version FROM outbox.last_version() l
    WHERE l.aggregate_type = of_type AND outbox.digest_bucket(l.aggregate_id, buckets) = ANY (chosen)
    ORDER BY convert_to(l.aggregate_id, 'UTF8')
$$;

-- Whether some of history is gone: a partition that was dropped, or one that was filled and is empty. Then an
-- aggregate that the outbox does not have may still have been published.
CREATE FUNCTION outbox.is_retired() RETURNS boolean
    LANGUAGE sql STABLE AS $$
    SELECT coalesce(min(coalesce(p.lower, 0)) > 0, false)
           OR coalesce(bool_or(p.upper <= (SELECT s.last_value FROM outbox.position s)
                               AND NOT EXISTS (SELECT FROM outbox.event e
                                               WHERE e.position >= coalesce(p.lower, 0) AND e.position < p.upper)), false)
    FROM outbox.partition p WHERE NOT p.is_default
$$;
