"""A subscriber that keeps a copy of every order. It needs no library of ours.

`receive` is the sequencer, the same in any language: lock where the aggregate stands, apply what is next, hold what is too
early. Its tables are in the database of the copy, because one transaction writes both. Any number may run: one works, and
the others stand by.
"""

import os
import uuid
from collections import namedtuple

import psycopg

import consume

# The aggregates of which it keeps the states, as the source names their type.
TYPE = os.environ.get("AGGREGATE_TYPE", "order")
QUEUE = f"{TYPE}-copy-python"

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
-- The copy.
CREATE TABLE IF NOT EXISTS copy (source text, id text, body jsonb NOT NULL, PRIMARY KEY (source, id))
"""

AGGREGATE = "(source, aggregate_type, aggregate_id) = (%s, %s, %s)"
EARLIER = "split_part(source, '~', 1) = %s AND source <> %s AND (aggregate_type, aggregate_id) = (%s, %s)"

Event = namedtuple("Event", "source aggregate_type aggregate_id version id type parent previous "
                            "starts baseline erased body")


class LostHistory(Exception):
    """The source has another history than this copy. It ends the program: an operator has to decide."""


def aggregate(event):
    return event[:3]


def incarnation(source):
    """The name and the number in shop~1764426123456; the first incarnation has the name alone."""
    name, _, number = source.partition("~")
    return name, int(number or 1)


def read(properties, body):
    """The event in a message."""
    try:
        headers = properties.headers
        flags = [headers.get(name, False) for name in ("chain_start", "baseline", "erased")]
        if not all(isinstance(flag, bool) for flag in flags):
            raise ValueError
        incarnation(properties.app_id)
        return Event(properties.app_id, headers["aggregate_type"], headers["aggregate_id"],
                     int(headers["aggregate_version"]), str(uuid.UUID(properties.message_id)), properties.type,
                     headers.get("source_parent"), named(headers.get("previous_id")), *flags, body)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise consume.Rejected(f"it is no event: {type(error).__name__}")


def named(previous):
    """The id of the event before, as an event names it. What is missing or no id is unknown, and proves nothing."""
    try:
        return str(uuid.UUID(previous))
    except (AttributeError, TypeError, ValueError):
        return None


def is_superseded(conn, event):
    """Whether the event is of an incarnation that a later one has replaced. One that follows the newest is taken."""
    name, number = incarnation(event.source)
    conn.execute("INSERT INTO newest VALUES (%s, %s) ON CONFLICT DO NOTHING", (name, number))
    newest, = conn.execute("SELECT incarnation FROM newest WHERE source = %s FOR SHARE", (name,)).fetchone()
    if number > newest:
        if event.parent != newest:
            raise LostHistory(f"{event.source} does not follow {newest}, the newest incarnation known")
        conn.execute("UPDATE newest SET incarnation = %s WHERE source = %s", (number, name))
    return number < newest


def receive(conn, properties, body):
    try:
        sequence(conn, read(properties, body))
    except psycopg.DataError as error:
        raise consume.Rejected(f"it is no event: {type(error).__name__}")


def sequence(conn, event):
    """The sequencer: one event, in a transaction that the caller commits."""
    if is_superseded(conn, event):
        return consume.say(f"not applied: {event.id} is of an earlier incarnation")
    # Two statements: one alone would not see a row that another one has just inserted.
    conn.execute("INSERT INTO follows VALUES (%s, %s, %s, 0) ON CONFLICT DO NOTHING", aggregate(event))
    version, last = conn.execute(f"SELECT version, event_id FROM follows WHERE {AGGREGATE} FOR UPDATE",
                                 aggregate(event)).fetchone()
    # The same aggregate in earlier incarnations. A new chain replaces it only from its whole state on.
    earlier, anew = (incarnation(event.source)[0], event.source, *event[1:3]), False
    if version == 0:
        anew, = conn.execute(f"SELECT EXISTS (SELECT FROM follows WHERE {EARLIER} AND version > 0)", earlier).fetchone()
    if event.version == version and event.id != last:
        raise LostHistory(f"{aggregate(event)}: there are two events of version {version}")
    if event.version <= version:
        return  # A duplicate.
    while event:
        jumps = not event.erased and (event.baseline or event.type == event.aggregate_type + ".deleted")
        if not jumps and (event.version != version + 1 or anew and not event.starts):
            return hold(conn, event, None)
        if not jumps and version > 0 and event.previous not in (None, last):
            raise LostHistory(f"{aggregate(event)}: version {event.version} follows another event than the one applied")
        error = attempt(conn, event, anew)
        if error:
            return hold(conn, event, error)
        version, last = event.version, event.id
        if anew:
            anew = False
            for table in ("follows", "held"):
                conn.execute(f"DELETE FROM {table} WHERE {EARLIER}", earlier)
        conn.execute(f"UPDATE follows SET version = %s, event_id = %s WHERE {AGGREGATE}",
                     (version, event.id, *aggregate(event)))
        conn.execute(f"DELETE FROM held WHERE {AGGREGATE} AND version <= %s", (*aggregate(event), version))
        event = held(conn, f"{AGGREGATE} AND version = %s", (*aggregate(event), version + 1))


def hold(conn, event, error):
    conn.execute("""INSERT INTO held VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
                    ON CONFLICT (source, aggregate_type, aggregate_id, version)
                    DO UPDATE SET error = coalesce(excluded.error, held.error)""", (*event, error))


def held(conn, condition, values):
    row = conn.execute(f"SELECT {', '.join(Event._fields)} FROM held WHERE {condition}", values).fetchone()
    return row and Event(*row)


def attempt(conn, event, anew):
    """Applies an event, or says why not; then it has changed nothing, and only its own aggregate waits."""
    try:
        with conn.transaction():  # A savepoint.
            apply(conn, event, anew)
        return None
    except consume.TRANSIENT:
        raise
    except Exception as error:
        return type(error).__name__  # Its text may quote personal data.


def apply(conn, event, anew):
    """What this subscriber is for. All the rest is the same for every other."""
    key = incarnation(event.source)[0], event.aggregate_id
    if anew:  # What it has is of a history that was lost.
        conn.execute("DELETE FROM copy WHERE (source, id) = (%s, %s)", key)
    if event.erased:
        return  # It counts as a version, and does nothing.
    if event.type in (TYPE + ".new", TYPE + ".changed", TYPE + ".baseline"):
        # As text: through a float, a number would lose digits.
        conn.execute("""INSERT INTO copy VALUES (%s, %s, %s::jsonb)
                        ON CONFLICT (source, id) DO UPDATE SET body = excluded.body""", (*key, event.body.decode()))
    elif event.type == TYPE + ".deleted":
        conn.execute("DELETE FROM copy WHERE (source, id) = (%s, %s)", key)
    # Any other type, also one of tomorrow, is a version like the others, and nothing to this copy.


def redrive(conn):
    """What was held with an error gets one more try at every start: a program that was repaired is the fix."""
    failed = conn.execute("SELECT source, aggregate_type, aggregate_id, version FROM held WHERE error IS NOT NULL")
    for key in failed.fetchall():
        with conn.transaction():
            event = held(conn, f"{AGGREGATE} AND version = %s", key)
            if event:
                sequence(conn, event)


def declare(channel):
    for exchange, kind in (("event_dispatcher", "topic"), ("event_dispatcher.by_aggregate", "headers")):
        channel.exchange_declare(exchange, kind, durable=True)
    channel.exchange_bind("event_dispatcher.by_aggregate", "event_dispatcher", "#")
    # One works and the others stand by. No limit to deliveries: RabbitMQ would drop what was at it.
    arguments = {"x-queue-type": "quorum", "x-single-active-consumer": True, "x-delivery-limit": 1_000_000_000}
    channel.queue_declare(QUEUE, durable=True, arguments=arguments)
    # By aggregate and not by type: a subscriber that follows versions needs all of them.
    channel.queue_bind(QUEUE, "event_dispatcher.by_aggregate", arguments={"x-match": "all", "aggregate_type": TYPE})


if __name__ == "__main__":
    consume.run(QUEUE, SCHEMA, declare, receive, redrive)
