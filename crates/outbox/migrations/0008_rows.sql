-- What an event may hold, in each column's whole range: what AMQP cannot carry, or what no subscriber could read, is
-- its writer's error, and never an event that has to be set aside. The relay decodes each row alone all the same, since
-- rows of before, or of a table without these checks, may hold anything.
--
-- The checks are NOT VALID: what is stored already stays, and is not read now. Adding them waits for open writers and
-- stops those behind it, so it gives up soon: run it again then.
SET LOCAL lock_timeout = '2s';

-- Whether a message can carry these headers, whatever their size: an object of at most 64, with names of at most 255
-- bytes, none of which RabbitMQ takes for more routing keys; and nested 4 deep at most (a header's value is at depth 1),
-- because receivers walk them. Every name in it is qualified, or of pg_catalog.
CREATE FUNCTION outbox.are_headers(headers jsonb) RETURNS boolean
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    RETURN pg_catalog.jsonb_typeof(headers) = 'object'
       AND NOT pg_catalog.jsonb_path_exists(headers, '$.**{5}')
       AND NOT headers ?| ARRAY['CC', 'BCC']
       AND (SELECT pg_catalog.count(*) <= 64 AND coalesce(pg_catalog.max(pg_catalog.octet_length(k)), 0) <= 255
            FROM pg_catalog.jsonb_object_keys(headers) AS k);
END
$$;

-- Sizes count as text: what another table had compressed would otherwise pass with far more than its limit.
-- Times are those that RFC 3339 can write. The last version and the last position of a bigint have no next one. What of
-- the stored events breaks these three can still be erased: that changes a row, for which every check holds.
ALTER TABLE outbox.event
    DROP CONSTRAINT event_payload_size,
    DROP CONSTRAINT event_headers_size,
    ADD CONSTRAINT event_payload_size CHECK (octet_length(payload::text) <= 16777216) NOT VALID,
    ADD CONSTRAINT event_headers_size CHECK (octet_length(headers::text) <= 65536) NOT VALID,
    ADD CONSTRAINT event_headers_fit CHECK (headers IS NULL OR outbox.are_headers(headers)) NOT VALID,
    ADD CONSTRAINT event_version_last CHECK (version < 9223372036854775807 OR coalesce(headers @> '{"erased": true}', false)) NOT VALID,
    ADD CONSTRAINT event_position_range CHECK (position BETWEEN 1 AND 9223372036854775806
                                            OR coalesce(headers @> '{"erased": true}', false)) NOT VALID,
    ADD CONSTRAINT event_created_at_range CHECK (created_at >= timestamptz '0001-01-01 00:00:00+00'
                                                 AND created_at < timestamptz '10000-01-01 00:00:00+00'
                                              OR coalesce(headers @> '{"erased": true}', false)) NOT VALID;

-- The sequence ends long before the numbers do: a setval to their end is refused, and partitions fit above every
-- position. Where it stands higher already, it stays as it is.
DO $$
BEGIN
    IF (SELECT last_value < 9000000000000000000 FROM outbox.position) THEN
        ALTER SEQUENCE outbox.position MAXVALUE 9000000000000000000;
    END IF;
END
$$;

-- As before, but where the sequence has been set so high that few positions are left, it says so: otherwise the sum of
-- two numbers would be out of range, and nothing would tell of what.
CREATE OR REPLACE FUNCTION outbox.add_partition(size bigint) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '100ms' AS $$
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
                        'It was set there by hand. Set it back to the highest position in use: '
                        'SELECT setval(''outbox.position'', (SELECT max(position) FROM outbox.event))', mark
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

-- As before, but one absurd version makes no sum that is out of range, and so no digest of the others impossible.
CREATE OR REPLACE FUNCTION outbox.digest(buckets integer)
    RETURNS TABLE (aggregate_type text, bucket integer, aggregates bigint, versions bigint, hash bigint)
    LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT l.aggregate_type, outbox.digest_bucket(l.aggregate_id, buckets), count(*),
           least(sum(l.version), 9223372036854775807)::bigint,
           bit_xor(outbox.digest_hash(l.aggregate_id, l.version))
    FROM outbox.last_version() l
    -- What a table without its checks may have, belongs to no aggregate.
    WHERE l.aggregate_type IS NOT NULL AND l.aggregate_id IS NOT NULL AND l.version IS NOT NULL
    GROUP BY 1, 2
$$;

-- As before, but a body that is nested as deep as the server can parse is erased, too: here it parses less deep, because
-- it is called from within.
CREATE OR REPLACE FUNCTION outbox.erased(payload json, aggregate_id text) RETURNS json
    LANGUAGE plpgsql IMMUTABLE
    SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    id json := to_json(aggregate_id);
BEGIN
    BEGIN
        IF json_typeof(payload -> 'id') = 'string' THEN
            id := payload -> 'id';
        END IF;
    EXCEPTION WHEN untranslatable_character OR statement_too_complex THEN
        -- A body may hold "\u0000", which PostgreSQL can store but not read.
        NULL;
    END;
    RETURN '{"id":' || id || ',"erased":true}';
END
$$;
