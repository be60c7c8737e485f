"""A service that publishes its orders with outbox.publish: psycopg 3, and no library of ours.

Its tables are those of ../sql/orders.sql. Each function is one transaction: first the rows, then the order's lock, then the
body, then the event. The lock comes before the body is read, because another transaction may add a line meanwhile.
"""

import os

import psycopg
from psycopg.types.json import Json


def publish(conn, order_id, event):
    """Publishes the order as it is. outbox.lock holds it until the transaction ends, and others wait for it there."""
    conn.execute("SELECT outbox.lock('order', %s)", (str(order_id),))
    status = conn.execute("SELECT status FROM orders WHERE id = %s", (order_id,)).fetchone()
    if status is None:
        event, body = "order.deleted", {"id": str(order_id)}
    else:
        rows = conn.execute("SELECT item, price FROM order_line WHERE order_id = %s ORDER BY id", (order_id,))
        lines = [{"item": item, "price": price} for item, price in rows]
        body = {"id": order_id, "status": status[0], "total": sum(line["price"] for line in lines), "lines": lines}
    conn.execute("SELECT outbox.publish(%s, 'order', %s, %s)", (event, str(order_id), Json(body)))


def place(conn, item, price):
    with conn.transaction():
        (order_id,) = conn.execute("INSERT INTO orders DEFAULT VALUES RETURNING id").fetchone()
        conn.execute("INSERT INTO order_line (order_id, item, price) VALUES (%s, %s, %s)", (order_id, item, price))
        publish(conn, order_id, "order.new")
    return order_id


def add(conn, order_id, item, price):
    with conn.transaction():
        conn.execute("INSERT INTO order_line (order_id, item, price) VALUES (%s, %s, %s)", (order_id, item, price))
        publish(conn, order_id, "order.changed")


def pay(conn, order_id):
    with conn.transaction():
        conn.execute("UPDATE orders SET status = 'paid' WHERE id = %s", (order_id,))
        publish(conn, order_id, "order.changed")


def delete(conn, order_id):
    with conn.transaction():
        conn.execute("DELETE FROM orders WHERE id = %s", (order_id,))
        publish(conn, order_id, "order.deleted")


def main():
    # Each transaction is one of the functions above, and none is open in between.
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as conn:
        order_id = place(conn, "pen", 700)
        add(conn, order_id, "ink", 300)
        pay(conn, order_id)
        try:
            with conn.transaction():
                add(conn, order_id, "a mistake", -1)
                raise ValueError("the business says no")
        except ValueError:
            pass  # Rolled back, the line and its event: it is never published.
        delete(conn, place(conn, "paper", 500))
        conn.execute("NOTIFY outbox_event")  # After the commits: the relay looks at once, not only once a second.


if __name__ == "__main__":
    main()
