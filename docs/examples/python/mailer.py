"""A plain consumer with a side effect: one mail for each new order.

It writes mails into a table, from which another program sends them. The message's id is in the same row, so a message that
comes again sends no second mail. It follows no versions: a mail needs no order.
"""

import os

import psycopg

import consume

QUEUE = "mails"
# The type of event that sends a mail.
TYPE = os.environ.get("TYPE", "order.new")

SCHEMA = """
-- Once a mail is sent, its body may be erased. The row stays: a message may come again after weeks.
CREATE TABLE IF NOT EXISTS mail (message_id uuid PRIMARY KEY, body json, sent_at timestamptz)
"""


def receive(conn, properties, body):
    headers = properties.headers or {}
    # History that an operator publishes again, and states that are known, are no news. What was erased has no content.
    # They are not remembered: the event itself may still come.
    if any(headers.get(flag) for flag in ("replayed", "baseline", "erased")):
        return
    try:
        with conn.transaction():
            conn.execute("INSERT INTO mail (message_id, body) VALUES (%s, %s) ON CONFLICT DO NOTHING",
                         (properties.message_id, body.decode()))
    except (psycopg.DataError, psycopg.IntegrityError, UnicodeDecodeError) as error:
        raise consume.Rejected(type(error).__name__)  # Its text may quote the body.


def declare(channel):
    channel.exchange_declare("event_dispatcher", "topic", durable=True)
    # No limit to deliveries: RabbitMQ would drop what was at it.
    channel.queue_declare(QUEUE, durable=True, arguments={"x-queue-type": "quorum", "x-delivery-limit": 1_000_000_000})
    channel.queue_bind(QUEUE, "event_dispatcher", routing_key=TYPE)


if __name__ == "__main__":
    consume.run(QUEUE, SCHEMA, declare, receive)
