-- Way 2: the service says what it publishes, in the transaction of the change. The tables are those of orders.sql.

-- A new order. The function reads the body once the order is locked, so that it has the lines of everybody.
BEGIN;
INSERT INTO orders DEFAULT VALUES RETURNING id \gset
INSERT INTO order_line (order_id, item, price) VALUES (:id, 'pen', 700);
SELECT outbox.publish('order.new', 'order', :'id', body => 'public.order_body');
COMMIT;

-- A change: first the rows, then the event.
BEGIN;
INSERT INTO order_line (order_id, item, price) VALUES (:id, 'ink', 300);
SELECT outbox.publish('order.changed', 'order', :'id', body => 'public.order_body');
COMMIT;

-- What is rolled back is never published.
BEGIN;
UPDATE orders SET status = 'paid' WHERE id = :id;
SELECT outbox.publish('order.changed', 'order', :'id', body => 'public.order_body');
ROLLBACK;

-- The end. The body is the id alone.
BEGIN;
INSERT INTO orders DEFAULT VALUES RETURNING id \gset
SELECT outbox.publish('order.new', 'order', :'id', body => 'public.order_body');
COMMIT;
BEGIN;
DELETE FROM orders WHERE id = :id;
SELECT outbox.publish('order.deleted', 'order', :'id', json_build_object('id', :'id'));
COMMIT;

-- After the commit: the relay looks at once, and not only once a second.
NOTIFY outbox_event;
