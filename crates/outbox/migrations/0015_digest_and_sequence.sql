-- What the outbox has, as before, but the sum of versions is taken modulo 2^63, as inbox.digest takes it. Before, a sum
-- of 2^63 or more became the largest number here and began again at 0 there, so the two sides never had equal rows.
CREATE OR REPLACE FUNCTION outbox.digest(buckets integer)
    RETURNS TABLE (aggregate_type text, bucket integer, aggregates bigint, versions bigint, hash bigint)
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT l.aggregate_type, outbox.digest_bucket(l.aggregate_id, buckets), count(*),
           -- The sum of a bigint is numeric, which has no such limit; its remainder fits in a bigint.
           (sum(l.version) % 9223372036854775808)::bigint,
           bit_xor(outbox.digest_hash(l.aggregate_id, l.version))
    FROM outbox.last_version() l
    -- Rows of a table without its checks may lack these: they belong to no aggregate.
    WHERE l.aggregate_type IS NOT NULL AND l.aggregate_id IS NOT NULL AND l.version IS NOT NULL
    GROUP BY 1, 2
$$;

-- As before, but the repair that it prints works on an outbox whose events are all retired: the highest position in use is
-- then the one up to which a relay has settled. And it says when that repair cannot help.
CREATE OR REPLACE FUNCTION outbox.add_partition(size bigint) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '100ms'
    SET standard_conforming_strings = on AS $$
DECLARE
    mark      bigint;
    from_pos  bigint;
    number    bigint;
    partition text;
BEGIN
    IF size IS NULL OR size NOT BETWEEN 1000 AND 1000000000 THEN
        RAISE EXCEPTION 'a partition has from 1,000 to 1,000,000,000 positions, not %', size
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    -- One at a time. Key 1 of this class is the writers' lock, key 2 is this.
    IF NOT pg_try_advisory_xact_lock(1869968482, 2) THEN
        RETURN NULL;
    END IF;
    SELECT last_value INTO mark FROM outbox.position;
    IF mark > 8000000000000000000 THEN
        RAISE EXCEPTION 'the sequence outbox.position stands at %, near its end, where writers get no position any more. '
                        'It was set there by hand. If no event has a position up there, set it back to the highest '
                        'position in use: SELECT setval(''outbox.position'', greatest(1, '
                        '(SELECT max(position) FROM outbox.event), '
                        '(SELECT max(greatest(low_water, high)) FROM outbox.relay)))', mark
            USING ERRCODE = 'sequence_generator_limit_exceeded';
    END IF;
    SELECT max(p.upper) INTO from_pos FROM outbox.partition p;
    IF mark >= from_pos THEN
        from_pos := mark + size;
    END IF;
    SELECT max(substring(p.name FROM '^event_(\d+)$')::bigint) + 1 INTO number FROM outbox.partition p;
    partition := format('event_%s', number);
    EXECUTE format('CREATE TABLE outbox.%I (LIKE outbox.event INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', partition);
    EXECUTE format('CREATE UNIQUE INDEX %I ON outbox.%I (aggregate_type, aggregate_id, version)',
                   partition || '_aggregate', partition);
    EXECUTE format('ALTER TABLE outbox.event ATTACH PARTITION outbox.%I FOR VALUES FROM (%s) TO (%s)',
                   partition, from_pos, from_pos + size);
    RETURN partition;
END
$$;
