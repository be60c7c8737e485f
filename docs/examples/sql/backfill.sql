-- Gives a table that was there before the outbox its first events: one baseline for each row, which is the row's whole
-- state. It runs beside the service, in batches, and may be run again.
--
--   psql "$DATABASE_URL" -f docs/examples/sql/backfill.sql

-- For the example: a table with rows, from the time before the outbox.
CREATE TABLE IF NOT EXISTS product (
    id    text   PRIMARY KEY,
    name  text   NOT NULL,
    price bigint NOT NULL
);
INSERT INTO product SELECT 'p-' || n, 'product ' || n, n FROM generate_series(1, 1200) AS n ON CONFLICT DO NOTHING;

-- 1. The version. With a constant default PostgreSQL rewrites no row. From here on each change of a row raises it, and
--    the service that does so and inserts the events is rolled out before step 2.
ALTER TABLE product ADD COLUMN IF NOT EXISTS version bigint NOT NULL DEFAULT 0;

-- 2. The baselines, 500 rows in a transaction. Within each: lock the rows in the order of their ids, raise their
--    versions, then read the bodies and insert the events. A service that writes to one of these rows waits for one
--    batch at most.
DO $$
DECLARE
    batch text[];
    last  text := '';
BEGIN
    LOOP
        batch := ARRAY(SELECT id FROM product WHERE id > last ORDER BY id LIMIT 500 FOR UPDATE);
        EXIT WHEN cardinality(batch) = 0;
        UPDATE product SET version = version + 1 WHERE id = ANY (batch);
        INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers)
            SELECT 'product', id, version, 'product.baseline',
                   json_build_object('id', id, 'name', name, 'price', price), '{"baseline": true}'
            FROM product WHERE id = ANY (batch);
        last := batch[cardinality(batch)];
        COMMIT;
    END LOOP;
END
$$;
