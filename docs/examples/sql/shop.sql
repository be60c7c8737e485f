-- What a service does with its orders, by hand. With capture.sql, each transaction publishes the orders that it changed.
BEGIN;
INSERT INTO orders DEFAULT VALUES RETURNING id \gset
INSERT INTO order_line (order_id, item, price) VALUES (:id, 'pen', 700), (:id, 'ink', 300);
COMMIT;

UPDATE orders SET status = 'paid' WHERE id = :id;
-- In bulk: one event for each order that has a pen.
UPDATE order_line SET price = price + 10 WHERE item = 'pen';

-- What is rolled back is never published.
BEGIN;
DELETE FROM order_line WHERE order_id = :id;
ROLLBACK;

-- The lines go along, and the event is order.deleted.
INSERT INTO orders DEFAULT VALUES RETURNING id \gset
INSERT INTO order_line (order_id, item, price) VALUES (:id, 'paper', 500);
DELETE FROM orders WHERE id = :id;
