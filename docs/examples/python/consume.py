"""What subscriber.py and mailer.py share: one transaction for each message, acknowledged after its commit, until SIGTERM.

It needs DATABASE_URL, AMQP_URL, and SOURCE: the followed sources with the users of the broker that publish them, such as
"shop=outbox_relay_shop", with commas between. RabbitMQ verifies user_id and nothing else of a message.
"""

import os
import random
import signal
import sys
import time

import pika
import psycopg

# The database or the broker is at fault, and not the message: it comes again.
TRANSIENT = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.ReadOnlySqlTransaction)

REJECTED = """
-- Messages that are no events: for an operator, and bounded.
CREATE TABLE IF NOT EXISTS rejected (at timestamptz NOT NULL DEFAULT now(), reason text NOT NULL, body bytea NOT NULL)
"""


class Rejected(Exception):
    """The message can never be applied: it is put aside, and the next one goes on."""


def say(words):
    print(words, file=sys.stderr, flush=True)


def sources():
    found = {}
    for publisher in os.environ["SOURCE"].split(","):
        source, user = publisher.split("=", 1)
        found.setdefault(source, set()).add(user)
    return found


def is_followed(properties, followed):
    """Whether the message is of a followed source, and of its user. The number of an incarnation is no part of a name."""
    source = (properties.app_id or "").partition("~")[0]
    if source in followed and properties.user_id not in followed[source]:
        say(f"not applied: {properties.user_id!r} does not publish {source!r}. Is it forged, or was the user renamed?")
    return properties.user_id in followed.get(source, ())


def run(queue, schema, declare, receive, begin=lambda conn: None):
    """Calls `receive(conn, properties, body)` for each message, in a transaction. `declare(channel)` makes the queue.
    An error of `receive` other than TRANSIENT and Rejected ends the program."""
    stopping, delay, followed = [], 0, sources()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.append(True))

    def consume():
        nonlocal delay
        with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as conn:
            conn.execute(REJECTED)
            conn.execute(schema)
            begin(conn)
            with pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"])) as broker:
                channel = broker.channel()
                declare(channel)
                channel.basic_qos(prefetch_count=100)
                # Ends when the broker cancels, for example because the queue was deleted.
                for method, properties, body in channel.consume(queue, inactivity_timeout=0.2):
                    if stopping:
                        return  # What was delivered and not acknowledged goes back.
                    if method:
                        if is_followed(properties, followed):
                            apply(conn, properties, body)
                        channel.basic_ack(method.delivery_tag)  # After the commit, never before it.
                        delay = 0

    def apply(conn, properties, body):
        with conn.transaction():
            try:
                with conn.transaction():  # A savepoint.
                    receive(conn, properties, body)
            except Rejected as error:
                say(f"rejected: {properties.message_id}: {error}")
                conn.execute("INSERT INTO rejected (reason, body) VALUES (%s, %s)", (str(error), body[:65536]))

    while not stopping:
        try:
            consume()
        except (*TRANSIENT, pika.exceptions.AMQPError, OSError) as error:
            say(f"waiting: {type(error).__name__}: {error}")
        # Longer each time, at most 30 s, and not in step with others.
        delay = min(delay * 2 or 0.5, 30)
        end = time.monotonic() + random.uniform(delay / 2, delay)
        while not stopping and time.monotonic() < end:
            time.sleep(0.1)
