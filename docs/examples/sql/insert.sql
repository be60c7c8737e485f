-- Way 3: the service has versions of its own, in its own rows, and inserts the events. The tables are those of orders.sql,
-- with a version. In each transaction, and each a statement of its own:
--   1. Lock the order's row, and take its next version from it: 1, 2, 3, ... without holes.
--   2. Make the other changes.
--   3. Read the body, and insert the event, without a position.
-- In one statement, a body would lack the lines of a transaction that it has waited for, and subscribers would stay wrong.
ALTER TABLE orders ADD COLUMN IF NOT EXISTS version bigint NOT NULL DEFAULT 0;

-- A new order: nobody else knows its row.
BEGIN;
INSERT INTO orders (version) VALUES (1) RETURNING id \gset
INSERT INTO order_line (order_id, item, price) VALUES (:id, 'pen', 700);
INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    VALUES ('order', :'id', 1, 'order.new', order_body(:id));
COMMIT;

-- A change.
BEGIN;
UPDATE orders SET version = version + 1 WHERE id = :id;
INSERT INTO order_line (order_id, item, price) VALUES (:id, 'ink', 300);
INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    SELECT 'order', id, version, 'order.changed', order_body(id) FROM orders WHERE id = :id;
COMMIT;

-- What is rolled back is never published.
BEGIN;
UPDATE orders SET version = version + 1, status = 'paid' WHERE id = :id;
INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    SELECT 'order', id, version, 'order.changed', order_body(id) FROM orders WHERE id = :id;
ROLLBACK;

-- The end is a version, too. Its body is the id alone, so one statement is enough.
BEGIN;
INSERT INTO orders (version) VALUES (1) RETURNING id \gset
INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    VALUES ('order', :'id', 1, 'order.new', order_body(:id));
COMMIT;
WITH gone AS (
    DELETE FROM orders WHERE id = :id RETURNING *
)
INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    SELECT 'order', id, version + 1, 'order.deleted', json_build_object('id', id::text) FROM gone;

-- After the commit: the relay looks at once, and not only once a second.
NOTIFY outbox_event;
