-- Way 1: publishes every change of the tables of orders.sql, whoever makes it. No program changes.
SET lock_timeout = '2s';
BEGIN;
SELECT outbox.capture('orders', 'order', body => 'public.order_body');
SELECT outbox.capture('order_line', 'order', key => 'order_id');
COMMIT;
