"""A service that publishes its orders, in Python. Needs psycopg2 and DATABASE_URL, and no library of ours.

The rules are the same in any language: lock the aggregate's row first, take its next version from it, read the body in
a later statement, insert the event in the same transaction, and never give a position. order.sql says why the body
must not be read in the statement that locks.
"""

import json
import os
import uuid

import psycopg2

TABLES = """
CREATE TABLE IF NOT EXISTS customer_order (id text PRIMARY KEY, version bigint NOT NULL);
CREATE TABLE IF NOT EXISTS order_line (
    order_id text NOT NULL REFERENCES customer_order ON DELETE CASCADE,
    item text NOT NULL, price bigint NOT NULL, PRIMARY KEY (order_id, item))
"""


def publish(cursor, order, version, kind, body):
    """Appends an event of an order whose row this transaction has locked."""
    cursor.execute(
        """INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
           VALUES ('order', %s, %s, %s, %s)""",
        (order, version, "order." + kind, json.dumps(body)),
    )


def body(cursor, order):
    """The whole order, as it is once its row is locked."""
    cursor.execute("SELECT item, price FROM order_line WHERE order_id = %s ORDER BY item", (order,))
    lines = [{"item": item, "price": price} for item, price in cursor.fetchall()]
    return {"id": order, "total": sum(line["price"] for line in lines), "lines": lines}


def create(conn, order, item, price):
    with conn, conn.cursor() as cursor:
        cursor.execute("INSERT INTO customer_order (id, version) VALUES (%s, 1)", (order,))
        cursor.execute("INSERT INTO order_line VALUES (%s, %s, %s)", (order, item, price))
        publish(cursor, order, 1, "new", body(cursor, order))


def add(conn, order, item, price):
    with conn, conn.cursor() as cursor:
        # A transaction that changes the same order at the same time waits here, and takes the version after this one.
        cursor.execute(
            "UPDATE customer_order SET version = version + 1 WHERE id = %s RETURNING version", (order,)
        )
        (version,) = cursor.fetchone()
        cursor.execute("INSERT INTO order_line VALUES (%s, %s, %s)", (order, item, price))
        publish(cursor, order, version, "changed", body(cursor, order))


def delete(conn, order):
    with conn, conn.cursor() as cursor:
        cursor.execute("DELETE FROM customer_order WHERE id = %s RETURNING version", (order,))
        (version,) = cursor.fetchone()
        publish(cursor, order, version + 1, "deleted", {"id": order})


def main():
    conn = psycopg2.connect(os.environ["DATABASE_URL"])
    with conn, conn.cursor() as cursor:
        cursor.execute(TABLES)
    order = f"py-{uuid.uuid4()}"
    create(conn, order, "pen", 7)
    add(conn, order, "ink", 3)
    try:
        with conn, conn.cursor() as cursor:
            cursor.execute("UPDATE customer_order SET version = version + 1 WHERE id = %s", (order,))
            publish(cursor, order, 3, "changed", {"id": order, "total": -1})
            raise ValueError("the business says no")
    except ValueError:
        pass  # Rolled back, both of them: it was never published.
    delete(conn, order)
    # The relay looks once a second; told after the commit, it looks at once.
    conn.autocommit = True
    with conn.cursor() as cursor:
        cursor.execute("NOTIFY outbox_event")


if __name__ == "__main__":
    main()
