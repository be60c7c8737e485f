"""A plain consumer, in Python: prints each new income once, in any order. Needs pika and AMQP_URL.

It remembers the ids that it has seen, in the transaction of its own change. It continues after a restart of its own or
of the broker. It stands for a program with side effects, such as mails and payments: what an operator publishes again, a
baseline, and an event whose content was erased do nothing.
"""

import json, os, sqlite3, time
from decimal import Decimal

import pika

store = sqlite3.connect(os.environ.get("SEEN", "my-incomes.db"))
store.execute("CREATE TABLE IF NOT EXISTS seen (message_id TEXT PRIMARY KEY)")

def on_event(channel, method, properties, body):
    with store:  # one transaction: what was seen, and what your service makes of it
        new = store.execute("INSERT OR IGNORE INTO seen VALUES (?)", (properties.message_id,)).rowcount
        headers = properties.headers
        if new and not any(headers.get(flag) for flag in ("replayed", "baseline", "erased")):
            income = json.loads(body, parse_float=Decimal)
            print(income["person"]["cpf"], income["value"], flush=True)
    channel.basic_ack(method.delivery_tag)  # after the commit

def consume():
    channel = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"])).channel()
    channel.exchange_declare("event_dispatcher", "topic", durable=True)
    channel.queue_declare("my-incomes", durable=True, arguments={"x-queue-type": "quorum"})
    channel.queue_bind("my-incomes", "event_dispatcher", routing_key="income.new")
    channel.basic_qos(prefetch_count=100)
    channel.basic_consume("my-incomes", on_event)
    channel.start_consuming()

while True:
    try:
        consume()
    except pika.exceptions.AMQPError as error:
        print("the broker is away:", repr(error), flush=True)
        time.sleep(2)
