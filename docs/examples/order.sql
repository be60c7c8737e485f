-- A service that publishes its orders, in plain SQL. An order has lines, so its body is read from two tables. The
-- rules are the same in any language, and each is a statement of its own, in this order:
--   1. Lock the aggregate's row, and take its next version from it: 1, 2, 3, … without holes.
--   2. Change what is to be changed.
--   3. Read the body, and insert the event; never give a position. All of it in one transaction.
--
-- Why not one statement for everything: a statement sees what was committed before it began. Where it has to wait for
-- the lock, PostgreSQL shows it the newest version of the row that it waited for, but the other tables as they were
-- before the wait. Its body would lack the lines of the transaction that it waited for, it would be the order's last
-- event, and so every subscriber would stay wrong. A statement that begins after the lock sees them.
--
--   psql "$DATABASE_URL" -f docs/examples/order.sql
CREATE TABLE IF NOT EXISTS customer_order (
    id      text   PRIMARY KEY,
    version bigint NOT NULL
);
CREATE TABLE IF NOT EXISTS order_line (
    order_id text   NOT NULL REFERENCES customer_order ON DELETE CASCADE,
    item     text   NOT NULL,
    price    bigint NOT NULL,
    PRIMARY KEY (order_id, item)
);

-- The body of an order: all of it.
CREATE OR REPLACE FUNCTION order_body(wanted text) RETURNS json LANGUAGE sql STABLE AS $$
    SELECT json_build_object('id', wanted, 'total', coalesce(sum(price), 0),
                             'lines', coalesce(json_agg(json_build_object('item', item, 'price', price) ORDER BY item), '[]'))
    FROM order_line WHERE order_id = wanted
$$;

-- A new id, which psql keeps as :'id'. A key that is used again goes on with the next version, and not with 1.
SELECT 'sql-' || gen_random_uuid() AS id \gset

-- A new order: nobody else knows its row, so there is nothing to wait for.
BEGIN;
INSERT INTO customer_order (id, version) VALUES (:'id', 1);
INSERT INTO order_line (order_id, item, price) VALUES (:'id', 'pen', 10);
INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    VALUES ('order', :'id', 1, 'order.new', order_body(:'id'));
COMMIT;

-- A change. The update of the order comes first, whatever else is to be changed: it locks the row.
BEGIN;
UPDATE customer_order SET version = version + 1 WHERE id = :'id';
INSERT INTO order_line (order_id, item, price) VALUES (:'id', 'ink ' || txid_current(), 2);
INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    SELECT 'order', id, version, 'order.changed', order_body(id) FROM customer_order WHERE id = :'id';
COMMIT;

-- What is rolled back was never there, for any subscriber.
BEGIN;
UPDATE customer_order SET version = version + 1 WHERE id = :'id';
DELETE FROM order_line WHERE order_id = :'id';
INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    SELECT 'order', id, version, 'order.changed', order_body(id) FROM customer_order WHERE id = :'id';
ROLLBACK;

-- The end: the deletion is the aggregate's last version. Its body is the id alone, so one statement is enough.
WITH gone AS (
    DELETE FROM customer_order WHERE id = :'id' RETURNING *
)
INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
    SELECT 'order', id, version + 1, 'order.deleted', json_build_object('id', id) FROM gone;

-- The relay looks once a second; told, it looks at once. After the commit: within a transaction, NOTIFY
-- would make all commits of the server wait for one another.
NOTIFY outbox_event;
