-- How much is kept of a message that cannot be applied: at most 64 KiB of its body, and at most 1,000 of the names
-- in it. `bytes` is how long the body was. What is stored already stays as it is.
ALTER TABLE inbox.rejected ADD COLUMN bytes bigint;
UPDATE inbox.rejected SET bytes = octet_length(body);
ALTER TABLE inbox.rejected ALTER COLUMN bytes SET NOT NULL;

-- What a consumer has applied of a source, as before; a sum of versions that is larger than the largest number begins
-- again at 0, so that no version that somebody sends makes two databases incomparable.
CREATE OR REPLACE FUNCTION inbox.digest(of_consumer text, of_source text, buckets integer)
    RETURNS TABLE (aggregate_type text, bucket integer, aggregates bigint, versions bigint, hash bigint)
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT a.aggregate_type, inbox.digest_bucket(a.aggregate_id, buckets),
           count(*) FILTER (WHERE a.version > 0), (sum(a.version) % 9223372036854775808)::bigint,
           coalesce(bit_xor(inbox.digest_hash(a.aggregate_id, a.version)) FILTER (WHERE a.version > 0), 0)
    FROM inbox.aggregate a
    WHERE a.consumer = of_consumer AND a.source = of_source
    GROUP BY 1, 2
$$;
