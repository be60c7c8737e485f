"""A service that publishes its orders, in Python. Needs psycopg2 and DATABASE_URL, and no library of ours.

The rules are the same in any language: lock the aggregate's row, take its next version from it, insert the
event in the same transaction, and never give a position.
"""

import json
import os

import psycopg2


def publish(cursor, order, version, kind, body):
    """Appends an event of an order whose row this transaction has locked."""
    cursor.execute(
        """INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload)
           VALUES ('order', %s, %s, %s, %s)""",
        (order, version, "order." + kind, json.dumps(body)),
    )


def create(conn, order, total):
    with conn, conn.cursor() as cursor:
        cursor.execute("INSERT INTO customer_order (id, total, version) VALUES (%s, %s, 1)", (order, total))
        publish(cursor, order, 1, "new", {"id": order, "total": total})


def add(conn, order, amount):
    with conn, conn.cursor() as cursor:
        # Whoever changes the same order at the same time waits here, and takes the version after this one.
        cursor.execute("SELECT total, version FROM customer_order WHERE id = %s FOR UPDATE", (order,))
        total, version = cursor.fetchone()
        total, version = total + amount, version + 1
        cursor.execute(
            "UPDATE customer_order SET total = %s, version = %s WHERE id = %s", (total, version, order)
        )
        publish(cursor, order, version, "changed", {"id": order, "total": total})
        return total


def delete(conn, order):
    with conn, conn.cursor() as cursor:
        cursor.execute("DELETE FROM customer_order WHERE id = %s RETURNING version", (order,))
        (version,) = cursor.fetchone()
        publish(cursor, order, version + 1, "deleted", {"id": order})


def main():
    conn = psycopg2.connect(os.environ["DATABASE_URL"])
    with conn, conn.cursor() as cursor:
        cursor.execute(
            """CREATE TABLE IF NOT EXISTS customer_order
               (id text PRIMARY KEY, total bigint NOT NULL, version bigint NOT NULL)"""
        )
    create(conn, "o-2", 7)
    add(conn, "o-2", 3)
    try:
        with conn, conn.cursor() as cursor:
            cursor.execute("UPDATE customer_order SET version = version + 1 WHERE id = 'o-2'")
            publish(cursor, "o-2", 3, "changed", {"id": "o-2", "total": -1})
            raise ValueError("the business says no")
    except ValueError:
        pass  # Rolled back, both of them: it was never published.
    delete(conn, "o-2")
    # The relay looks once a second; told after the commit, it looks at once.
    conn.autocommit = True
    with conn.cursor() as cursor:
        cursor.execute("NOTIFY outbox_event")


if __name__ == "__main__":
    main()
