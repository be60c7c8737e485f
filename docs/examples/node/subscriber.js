// A subscriber that keeps a copy of every order: amqplib and pg, and no library of ours.
//
// `sequence` is the sequencer, the same in any language: lock where the aggregate stands, apply what is next, hold what is
// too early. Its tables are in the database of the copy, because one transaction writes both. Any number may run: one
// works, and the others stand by.
//
// It needs DATABASE_URL, AMQP_URL, and SOURCE: the followed sources with the users of the broker that publish them, such as
// "shop=outbox_relay_shop", with commas between. RabbitMQ verifies user_id and nothing else of a message.

const amqplib = require("amqplib");
const { Client } = require("pg");

// The aggregates of which it keeps the states, as the source names their type.
const TYPE = process.env.AGGREGATE_TYPE ?? "order";
const QUEUE = `${TYPE}-copy-node`;

const SCHEMA = `
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
-- Messages that are no events: for an operator, and bounded.
CREATE TABLE IF NOT EXISTS rejected (at timestamptz NOT NULL DEFAULT now(), reason text NOT NULL, body bytea NOT NULL);
-- The copy.
CREATE TABLE IF NOT EXISTS copy (source text, id text, body jsonb NOT NULL, PRIMARY KEY (source, id))`;

const AGGREGATE = "(source, aggregate_type, aggregate_id) = ($1, $2, $3)";
const EARLIER = "split_part(source, '~', 1) = $1 AND source <> $2 AND (aggregate_type, aggregate_id) = ($3, $4)";
const FIELDS = ["source", "aggregate_type", "aggregate_id", "version", "id", "type", "parent", "previous", "starts",
  "baseline", "erased", "body"];
const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;

// The source has another history than this copy. It ends the program: an operator has to decide.
class LostHistory extends Error {}
// So does a defect of this program.
const FATAL = [LostHistory, ReferenceError, SyntaxError, TypeError];

const say = (words) => console.error(words);
const aggregate = (event) => [event.source, event.aggregate_type, event.aggregate_id];
const asId = (id) => (UUID.test(id) ? id.toLowerCase() : null);

const sources = {};
for (const publisher of process.env.SOURCE.split(",")) {
  const [source, user] = publisher.split("=");
  (sources[source] ??= new Set()).add(user);
}

// The name and the number in shop~1764426123456; the first incarnation has the name alone.
function incarnation(source) {
  const [name, number] = source.split("~");
  return [name, BigInt(number ?? 1)];
}

function isFollowed({ appId, userId }) {
  const [source] = (appId ?? "").split("~");
  const users = sources[source];
  if (users && !users.has(userId)) {
    say(`not applied: ${userId} does not publish ${source}. Is it forged, or was the user renamed?`);
  }
  return users?.has(userId) ?? false;
}

// The event in a message; null if it is none.
function read({ properties, content }) {
  const { headers } = properties;
  try {
    const event = {
      source: properties.appId, aggregate_type: headers.aggregate_type, aggregate_id: headers.aggregate_id,
      version: BigInt(headers.aggregate_version), id: asId(properties.messageId), type: properties.type,
      parent: headers.source_parent ?? null,
      previous: asId(headers.previous_id), // What is missing or no id is unknown, and proves nothing.
      starts: headers.chain_start ?? false, baseline: headers.baseline ?? false, erased: headers.erased ?? false,
      body: content,
    };
    incarnation(event.source);
    const texts = [event.id, event.type, event.aggregate_type, event.aggregate_id];
    const flags = [event.starts, event.baseline, event.erased];
    const fits = texts.every((text) => typeof text === "string") && flags.every((flag) => typeof flag === "boolean");
    return fits ? event : null;
  } catch {
    return null;
  }
}

// Whether the event is of an incarnation that a later one has replaced. One that follows the newest is taken.
async function isSuperseded(client, event) {
  const [name, number] = incarnation(event.source);
  await client.query("INSERT INTO newest VALUES ($1, $2) ON CONFLICT DO NOTHING", [name, number]);
  const { rows } = await client.query("SELECT incarnation FROM newest WHERE source = $1 FOR SHARE", [name]);
  const newest = BigInt(rows[0].incarnation);
  if (number > newest) {
    if (event.parent === null || BigInt(event.parent) !== newest) {
      throw new LostHistory(`${event.source} does not follow ${newest}, the newest incarnation known`);
    }
    await client.query("UPDATE newest SET incarnation = $1 WHERE source = $2", [number, name]);
  }
  return number < newest;
}

// The sequencer: one event, in a transaction that the caller commits.
async function sequence(client, event) {
  if (await isSuperseded(client, event)) {
    return say(`not applied: ${event.id} is of an earlier incarnation`);
  }
  const key = aggregate(event);
  // Two statements: one alone would not see a row that another one has just inserted.
  await client.query("INSERT INTO follows VALUES ($1, $2, $3, 0) ON CONFLICT DO NOTHING", key);
  const stands = await client.query(`SELECT version, event_id FROM follows WHERE ${AGGREGATE} FOR UPDATE`, key);
  let { version, event_id: last } = stands.rows[0];
  version = BigInt(version);
  // The same aggregate in earlier incarnations. A new chain replaces it only from its whole state on.
  const earlier = [incarnation(event.source)[0], ...key];
  let anew = false;
  if (version === 0n) {
    const before = `SELECT EXISTS (SELECT FROM follows WHERE ${EARLIER} AND version > 0) AS anew`;
    [{ anew }] = (await client.query(before, earlier)).rows;
  }
  if (event.version === version && event.id !== last) {
    throw new LostHistory(`${key}: there are two events of version ${version}`);
  }
  if (event.version <= version) return; // A duplicate.
  while (event) {
    const jumps = !event.erased && (event.baseline || event.type === `${event.aggregate_type}.deleted`);
    if (!jumps && (event.version !== version + 1n || (anew && !event.starts))) return hold(client, event, null);
    if (!jumps && version > 0n && event.previous !== null && event.previous !== last) {
      throw new LostHistory(`${key}: version ${event.version} follows another event than the one applied`);
    }
    const error = await attempt(client, event, anew);
    if (error) return hold(client, event, error);
    version = event.version;
    last = event.id;
    if (anew) {
      anew = false;
      for (const table of ["follows", "held"]) await client.query(`DELETE FROM ${table} WHERE ${EARLIER}`, earlier);
    }
    await client.query(`UPDATE follows SET version = $4, event_id = $5 WHERE ${AGGREGATE}`, [...key, version, last]);
    await client.query(`DELETE FROM held WHERE ${AGGREGATE} AND version <= $4`, [...key, version]);
    event = await held(client, [...key, version + 1n]);
  }
}

async function hold(client, event, error) {
  await client.query(`INSERT INTO held VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
                      ON CONFLICT (source, aggregate_type, aggregate_id, version)
                      DO UPDATE SET error = coalesce(excluded.error, held.error)`,
    [...FIELDS.map((field) => event[field]), error]);
}

async function held(client, key) {
  const { rows: [row] } = await client.query(`SELECT * FROM held WHERE ${AGGREGATE} AND version = $4`, key);
  return row && { ...row, version: BigInt(row.version) };
}

// The database or the broker is at fault, and not the message: it comes again. Without an SQLSTATE, the connection ended.
function isTransient(error) {
  return !error.code || !/^[0-9A-Z]{5}$/.test(error.code) || /^(08|40|53|55P03|57|25006)/.test(error.code);
}

// Applies an event, or says why not; then it has changed nothing, and only its own aggregate waits.
async function attempt(client, event, anew) {
  await client.query("SAVEPOINT attempt");
  try {
    await apply(client, event, anew);
    await client.query("RELEASE SAVEPOINT attempt");
    return null;
  } catch (error) {
    if (error.code && isTransient(error)) throw error;
    await client.query("ROLLBACK TO SAVEPOINT attempt");
    return error.code ?? error.name; // Its text may quote personal data.
  }
}

// What this subscriber is for. All the rest is the same for every other.
async function apply(client, event, anew) {
  const key = [incarnation(event.source)[0], event.aggregate_id];
  // What it has is of a history that was lost.
  if (anew) await client.query("DELETE FROM copy WHERE (source, id) = ($1, $2)", key);
  if (event.erased) return; // It counts as a version, and does nothing.
  if ([`${TYPE}.new`, `${TYPE}.changed`, `${TYPE}.baseline`].includes(event.type)) {
    // As text: JSON.parse would round numbers.
    await client.query(`INSERT INTO copy VALUES ($1, $2, $3::jsonb)
                        ON CONFLICT (source, id) DO UPDATE SET body = excluded.body`, [...key, event.body.toString()]);
  } else if (event.type === `${TYPE}.deleted`) {
    await client.query("DELETE FROM copy WHERE (source, id) = ($1, $2)", key);
  }
  // Any other type, also one of tomorrow, is a version like the others, and nothing to this copy.
}

async function transaction(client, work) {
  await client.query("BEGIN");
  try {
    await work();
    await client.query("COMMIT");
  } catch (error) {
    await client.query("ROLLBACK").catch(() => {});
    throw error;
  }
}

// What was held with an error gets one more try at every start: a program that was repaired is the fix.
async function redrive(client) {
  const failed = await client.query(
    "SELECT source, aggregate_type, aggregate_id, version FROM held WHERE error IS NOT NULL");
  for (const row of failed.rows) {
    await transaction(client, async () => {
      const event = await held(client, [...aggregate(row), row.version]);
      if (event) await sequence(client, event);
    });
  }
}

async function receive(client, message) {
  if (!isFollowed(message.properties)) return;
  const event = read(message);
  try {
    if (event) return await transaction(client, () => sequence(client, event));
  } catch (error) {
    if (!/^22...$/.test(error.code)) throw error; // Otherwise a text in it cannot be stored: no event has such.
  }
  say(`rejected: ${message.properties.messageId}: it is no event`);
  const reject = "INSERT INTO rejected (reason, body) VALUES ('it is no event', $1)";
  await client.query(reject, [message.content.subarray(0, 65536)]);
}

async function declare(channel) {
  for (const [exchange, kind] of [["event_dispatcher", "topic"], ["event_dispatcher.by_aggregate", "headers"]]) {
    await channel.assertExchange(exchange, kind, { durable: true });
  }
  await channel.bindExchange("event_dispatcher.by_aggregate", "event_dispatcher", "#");
  // One works and the others stand by. No limit to deliveries: RabbitMQ would drop what was at it.
  const options = { "x-queue-type": "quorum", "x-single-active-consumer": true, "x-delivery-limit": 1_000_000_000 };
  await channel.assertQueue(QUEUE, { durable: true, arguments: options });
  // By aggregate and not by type: a subscriber that follows versions needs all of them.
  await channel.bindQueue(QUEUE, "event_dispatcher.by_aggregate", "", { "x-match": "all", aggregate_type: TYPE });
  await channel.prefetch(100);
}

let stopping = false;
let stop = () => {};
for (const signal of ["SIGTERM", "SIGINT"]) {
  process.on(signal, () => {
    stopping = true;
    stop();
  });
}

// Consumes until SIGTERM, or until one of the two connections ends. `progress` is called for each message that is done.
async function consume(progress) {
  const client = new Client({ connectionString: process.env.DATABASE_URL, connectionTimeoutMillis: 10_000 });
  let end;
  const ended = new Promise((resolve, reject) => {
    stop = resolve;
    end = reject;
  });
  ended.catch(() => {}); // It may come before it is awaited.
  client.on("error", end);
  let broker;
  let working = Promise.resolve();
  try {
    await client.connect();
    await client.query(SCHEMA);
    await redrive(client);
    broker = await amqplib.connect(process.env.AMQP_URL, { timeout: 10_000 });
    broker.on("error", end);
    broker.on("close", () => end(new Error("the broker has closed the connection")));
    const channel = await broker.createChannel();
    channel.on("error", end);
    await declare(channel);
    let failed = false;
    await channel.consume(QUEUE, (message) => {
      if (!message) return end(new Error("the broker has cancelled the consumer"));
      // One after the other.
      working = working.then(async () => {
        if (stopping || failed) return; // What is not acknowledged goes back.
        await receive(client, message);
        channel.ack(message); // After the commit, never before it.
        progress();
      }).catch((error) => {
        failed = true;
        end(error);
      });
    });
    if (!stopping) await ended;
  } finally {
    await working;
    await broker?.close().catch(() => {});
    await client.end().catch(() => {});
  }
}

async function main() {
  let delay = 0;
  while (!stopping) {
    try {
      await consume(() => { delay = 0; });
    } catch (error) {
      if (FATAL.some((kind) => error instanceof kind) || !isTransient(error)) throw error;
      say(`waiting: ${error.message || error.code}`);
    }
    // Longer each time, at most 30 s, and not in step with others.
    delay = Math.min(delay * 2 || 500, 30_000);
    const end = Date.now() + delay / 2 + Math.random() * delay / 2;
    while (!stopping && Date.now() < end) await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

main();
