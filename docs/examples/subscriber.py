"""A subscriber that keeps everybody's name and address, in Python. Needs pika, psycopg2, AMQP_URL,
DATABASE_URL and SOURCE, and no library of ours.

`receive` is the whole of the sequencer, the same in any language: lock where the aggregate stands, apply what
is next, hold what is too early, commit, and only then acknowledge. Its two tables stand in the same database
as the copy, because one transaction has to write both.

It ends when a connection breaks, and what it had not acknowledged comes again: let a service manager start it
anew. Any number of them may run at the same time.
"""

import json
import os
import signal
import sys
import uuid
from collections import namedtuple

import pika
import psycopg2

QUEUE = "contacts"

SCHEMA = """
-- The last version applied, and by which event. It never expires, so neither does deduplication.
CREATE TABLE IF NOT EXISTS follows (
    source text, aggregate_type text, aggregate_id text, version bigint NOT NULL, event_id text,
    PRIMARY KEY (aggregate_type, aggregate_id, source));
-- The newest incarnation of each source that was seen: what is below it is of a database that lost commits.
CREATE TABLE IF NOT EXISTS newest (source text PRIMARY KEY, incarnation bigint NOT NULL);
-- Events that wait: for an earlier one, or, where there is an error, for a program that can apply them.
CREATE TABLE IF NOT EXISTS held (
    source text, aggregate_type text, aggregate_id text, version bigint, id text, type text, parent bigint,
    previous text, starts boolean, baseline boolean, erased boolean, body bytea, error text,
    PRIMARY KEY (aggregate_type, aggregate_id, source, version));
CREATE TABLE IF NOT EXISTS contact (id uuid PRIMARY KEY, name text NOT NULL, address text)
"""

# The users of the broker that publish each source: "person=outbox_relay_person", with commas between. RabbitMQ verifies
# user_id and nothing else of a message: without SOURCE, whoever may write to the exchange is believed.
SOURCES = {}
for publisher in filter(None, os.environ.get("SOURCE", "").split(",")):
    source, user = publisher.split("=", 1)
    SOURCES.setdefault(source, set()).add(user)

AGGREGATE = "(source, aggregate_type, aggregate_id) = (%s, %s, %s)"
EARLIER = "split_part(source, '~', 1) = %s AND source <> %s AND (aggregate_type, aggregate_id) = (%s, %s)"

Event = namedtuple("Event", "source aggregate_type aggregate_id version id type parent previous "
                            "starts baseline erased body")


def aggregate(event):
    return event[:3]


def incarnation(source):
    """The name and the number in person~1764426123456; the first incarnation has the name alone."""
    name, _, number = source.partition("~")
    return name, int(number or 1)


def refused(properties):
    """Why a message is not believed; None when it is. All incarnations of a source are its own."""
    source, _ = incarnation(properties.app_id or "")
    if not SOURCES or properties.user_id in SOURCES.get(source, ()):
        return None
    if source in SOURCES:
        return f"the user {properties.user_id!r} does not publish {source!r}: forged, or was it renamed?"
    return f"the source {source!r} is not followed"


def read(properties, body):
    """The event in a message. What is none raises an error, which ends the program: nothing is skipped."""
    headers = properties.headers
    flags = (headers.get(name, False) for name in ("chain_start", "baseline", "erased"))
    return Event(properties.app_id, headers["aggregate_type"], headers["aggregate_id"],
                 int(headers["aggregate_version"]), str(uuid.UUID(properties.message_id)), properties.type,
                 headers.get("source_parent"), named(headers.get("previous_id")), *flags, body)


def named(previous):
    """The id of the event before, as an event names it. What is missing or no id is unknown, and proves nothing."""
    try:
        return str(uuid.UUID(previous))
    except (AttributeError, TypeError, ValueError):
        return None


def superseded(cursor, event):
    """Whether the event is of an incarnation that a later one has replaced. One that follows the newest is taken."""
    name, number = incarnation(event.source)
    cursor.execute("INSERT INTO newest VALUES (%s, %s) ON CONFLICT DO NOTHING", (name, number))
    cursor.execute("SELECT incarnation FROM newest WHERE source = %s FOR SHARE", (name,))
    newest, = cursor.fetchone()
    if number > newest:
        if event.parent != newest:
            raise RuntimeError(f"{event.source} does not follow {newest}, the newest incarnation known: who is it?")
        cursor.execute("UPDATE newest SET incarnation = %s WHERE source = %s", (number, name))
    return number < newest


def receive(cursor, event):
    """The sequencer: one event, in a transaction that the caller commits."""
    if superseded(cursor, event):
        return print(f"{event.id} is of an earlier incarnation, and was not applied", file=sys.stderr)
    # Two statements: one alone would not see a row that somebody else has just inserted.
    cursor.execute("INSERT INTO follows VALUES (%s, %s, %s, 0) ON CONFLICT DO NOTHING", aggregate(event))
    cursor.execute(f"SELECT version, event_id FROM follows WHERE {AGGREGATE} FOR UPDATE", aggregate(event))
    version, last = cursor.fetchone()
    # The same aggregate in earlier incarnations. A new chain replaces it only from its whole state on.
    earlier, anew = (incarnation(event.source)[0], event.source, *event[1:3]), False
    if version == 0:
        cursor.execute(f"SELECT EXISTS (SELECT FROM follows WHERE {EARLIER} AND version > 0)", earlier)
        anew, = cursor.fetchone()
    if event.version == version and event.id != last:
        raise RuntimeError(f"{aggregate(event)}: two events of version {version}: the source lost history")
    if event.version <= version:
        return  # A duplicate.
    while event:
        jumps = not event.erased and (event.baseline or event.type == event.aggregate_type + ".deleted")
        if not jumps and (event.version != version + 1 or anew and not event.starts):
            return hold(cursor, event, None)
        if not jumps and version > 0 and event.previous not in (None, last):
            raise RuntimeError(f"{aggregate(event)}: version {event.version} follows another event than the one "
                               f"applied: the source lost history")
        error = attempt(cursor, event)
        if error:
            return hold(cursor, event, error)
        version, last = event.version, event.id
        if anew:
            anew = False
            for table in ("follows", "held"):
                cursor.execute(f"DELETE FROM {table} WHERE {EARLIER}", earlier)
        cursor.execute(f"UPDATE follows SET version = %s, event_id = %s WHERE {AGGREGATE}",
                       (version, event.id, *aggregate(event)))
        cursor.execute(f"DELETE FROM held WHERE {AGGREGATE} AND version <= %s", (*aggregate(event), version))
        event = held(cursor, f"{AGGREGATE} AND version = %s", (*aggregate(event), version + 1))


def hold(cursor, event, error):
    cursor.execute("""INSERT INTO held VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
                      ON CONFLICT (source, aggregate_type, aggregate_id, version)
                      DO UPDATE SET error = coalesce(excluded.error, held.error)""", (*event, error))


def held(cursor, condition, values=()):
    cursor.execute(f"SELECT {', '.join(Event._fields)} FROM held WHERE {condition} LIMIT 1", values)
    row = cursor.fetchone()
    return row and Event(*row[:-1], bytes(row[-1]))


def attempt(cursor, event):
    """Applies an event, or says why not; then it has changed nothing, and only its own aggregate waits."""
    cursor.execute("SAVEPOINT attempt")
    try:
        apply(cursor, event)
        cursor.execute("RELEASE SAVEPOINT attempt")
        return None
    except psycopg2.OperationalError:
        raise  # The database is at fault and not the event.
    except Exception as error:
        cursor.execute("ROLLBACK TO SAVEPOINT attempt")
        return type(error).__name__  # Its text may quote what is nobody's business.


def apply(cursor, event):
    """What this subscriber is for. All the rest is the same for every other."""
    if event.erased:
        return  # It counts as a version, and does nothing.
    if event.type in ("person.new", "person.changed", "person.baseline"):
        person = json.loads(event.body)
        cursor.execute("""INSERT INTO contact VALUES (%(id)s, %(name)s, %(address)s) ON CONFLICT (id)
                          DO UPDATE SET name = excluded.name, address = excluded.address""", person)
    elif event.type == "person.deleted":
        cursor.execute("DELETE FROM contact WHERE id = %s", (event.aggregate_id,))
    # Any other type, also one of tomorrow, is a version like the others, and nothing to this copy.


def redrive(conn):
    """What was held with an error gets one more try at every start: a program that was repaired is the fix."""
    with conn, conn.cursor() as cursor:
        cursor.execute("SELECT source, aggregate_type, aggregate_id, version FROM held WHERE error IS NOT NULL")
        failed = cursor.fetchall()
    for key in failed:
        with conn, conn.cursor() as cursor:
            event = held(cursor, f"{AGGREGATE} AND version = %s", key)
            if event:
                receive(cursor, event)


def declare(channel):
    for exchange, kind in (("event_dispatcher", "topic"), ("event_dispatcher.by_aggregate", "headers")):
        channel.exchange_declare(exchange, kind, durable=True)
    channel.exchange_bind("event_dispatcher.by_aggregate", "event_dispatcher", "#")
    # One works and the others stand by. No limit to deliveries: RabbitMQ would drop what was at it.
    arguments = {"x-queue-type": "quorum", "x-single-active-consumer": True, "x-delivery-limit": 1_000_000_000}
    channel.queue_declare(QUEUE, durable=True, arguments=arguments)
    # By aggregate and not by type: whoever follows versions needs all of them.
    matching = {"x-match": "all", "aggregate_type": "person"}
    channel.queue_bind(QUEUE, "event_dispatcher.by_aggregate", arguments=matching)
    channel.basic_qos(prefetch_count=100)


def main():
    stopping = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.append(True))
    conn = psycopg2.connect(os.environ["DATABASE_URL"])
    with conn, conn.cursor() as cursor:
        cursor.execute(SCHEMA)
    redrive(conn)
    channel = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"])).channel()
    declare(channel)
    for method, properties, body in channel.consume(QUEUE, inactivity_timeout=0.2):
        if stopping:
            break  # What was delivered and not acknowledged goes back.
        if method:
            why = refused(properties)
            if why:
                print(f"not applied: {why}", file=sys.stderr)
            else:
                with conn, conn.cursor() as cursor:
                    receive(cursor, read(properties, body))
            channel.basic_ack(method.delivery_tag)  # After the commit, never before it.
    channel.connection.close()


if __name__ == "__main__":
    main()
