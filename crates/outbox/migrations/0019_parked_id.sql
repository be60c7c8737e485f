-- An event that is set aside is found by its id. `outbox-relay parked show`, and what names an id for `retry` or `drop`,
-- read one row, however many are set aside.
--
-- The index has the rows that can be named: what is parked, and the first waiting event of each aggregate. Millions of
-- events that wait behind these have no entry, so waiting costs no more than before.
SET LOCAL lock_timeout = '2s';

CREATE FUNCTION outbox.parked_index(beside_writers boolean) RETURNS text
    LANGUAGE sql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
    SET standard_conforming_strings = on AS $$
    SELECT format('CREATE INDEX %s parked_id ON outbox.parked (relay, id)'
                  ' WHERE state = ''parked'' OR next_attempt_at IS NOT NULL',
                  CASE WHEN beside_writers THEN 'CONCURRENTLY' ELSE '' END)
$$;
COMMENT ON FUNCTION outbox.parked_index(boolean) IS
    'The statement that makes the index of outbox.parked by id.';
REVOKE EXECUTE ON FUNCTION outbox.parked_index(boolean) FROM PUBLIC;

-- With more rows than a relay sets aside, most of them wait, and to read them takes seconds. Erasures would wait for
-- that. `outbox-relay migrate` then makes the index, without a lock that stops anything.
DO $$
BEGIN
    IF (SELECT count(*) <= 100000 FROM (SELECT FROM outbox.parked LIMIT 100001) AS l) THEN
        EXECUTE outbox.parked_index(false);
    END IF;
END
$$;
