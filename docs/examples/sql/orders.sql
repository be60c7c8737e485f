-- The tables of a service that has orders, and what an event says of one. Nothing here knows of the outbox: it is what the
-- service has already. Prices are in cents.
CREATE TABLE IF NOT EXISTS orders (
    id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    status text   NOT NULL DEFAULT 'open'
);
CREATE TABLE IF NOT EXISTS order_line (
    id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    order_id bigint NOT NULL REFERENCES orders ON DELETE CASCADE,
    item     text   NOT NULL,
    price    bigint NOT NULL
);
CREATE INDEX IF NOT EXISTS order_line_order_id ON order_line (order_id);

-- The body: a whole order with its lines, so that a subscriber need not ask for more. Null if there is no such order.
CREATE OR REPLACE FUNCTION order_body(bigint) RETURNS json LANGUAGE sql STABLE
    RETURN (SELECT json_build_object('id', o.id, 'status', o.status, 'total', coalesce(sum(l.price), 0),
                                     'lines', coalesce(json_agg(json_build_object('item', l.item, 'price', l.price)
                                                                ORDER BY l.id) FILTER (WHERE l.id IS NOT NULL), '[]'))
            FROM orders o LEFT JOIN order_line l ON l.order_id = o.id
            WHERE o.id = $1
            GROUP BY o.id);
