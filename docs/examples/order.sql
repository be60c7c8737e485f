-- A service that publishes its orders, in plain SQL. The rules are the same in any language:
--   1. Lock the aggregate's row; inserting, updating or deleting it does.
--   2. Take its next version from that row: 1, 2, 3, … without holes.
--   3. Insert the event in the same transaction, and never give a position.
--
--   psql "$DATABASE_URL" -f docs/examples/order.sql
CREATE TABLE IF NOT EXISTS customer_order (
    id      text   PRIMARY KEY,
    total   bigint NOT NULL,
    version bigint NOT NULL
);

-- A new order. Either both rows are there afterwards or neither is.
BEGIN;
INSERT INTO customer_order (id, total, version) VALUES ('o-1', 10, 1);
INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    VALUES ('order', 'o-1', 1, 'order.new', '{"id": "o-1", "total": 10}');
COMMIT;

-- A change. The update locks the row and raises its version; a statement is a transaction of its own.
WITH changed AS (
    UPDATE customer_order SET total = 12, version = version + 1 WHERE id = 'o-1' RETURNING *
)
INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    SELECT 'order', id, version, 'order.changed', json_build_object('id', id, 'total', total) FROM changed;

-- What is rolled back was never there, for anybody.
BEGIN;
UPDATE customer_order SET total = 99, version = version + 1 WHERE id = 'o-1';
INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    VALUES ('order', 'o-1', 3, 'order.changed', '{"id": "o-1", "total": 99}');
ROLLBACK;

-- The end: the deletion is the aggregate's last version.
WITH gone AS (
    DELETE FROM customer_order WHERE id = 'o-1' RETURNING *
)
INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    SELECT 'order', id, version + 1, 'order.deleted', json_build_object('id', id) FROM gone;

-- The relay looks once a second; told, it looks at once. After the commit: within a transaction, NOTIFY
-- would make all commits of the server wait for one another.
NOTIFY outbox_event;
