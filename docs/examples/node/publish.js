// A service that publishes its orders with outbox.publish: pg, and no library of ours.
//
// Its tables are those of ../sql/orders.sql. Each function is one transaction: first the rows, then the event. The outbox
// calls order_body once it has locked the order, so that the body has the lines of everybody.

const { Client } = require("pg");

async function transaction(client, work) {
  await client.query("BEGIN");
  try {
    const result = await work();
    await client.query("COMMIT");
    return result;
  } catch (error) {
    await client.query("ROLLBACK");
    throw error;
  }
}

// An id of pg is a string already, since it is a bigint.
async function publish(client, type, id) {
  await client.query("SELECT outbox.publish($1, 'order', $2, body => 'public.order_body')", [type, id]);
}

async function place(client, item, price) {
  return transaction(client, async () => {
    const { rows: [{ id }] } = await client.query("INSERT INTO orders DEFAULT VALUES RETURNING id");
    await client.query("INSERT INTO order_line (order_id, item, price) VALUES ($1, $2, $3)", [id, item, price]);
    await publish(client, "order.new", id);
    return id;
  });
}

async function add(client, id, item, price) {
  await transaction(client, async () => {
    await client.query("INSERT INTO order_line (order_id, item, price) VALUES ($1, $2, $3)", [id, item, price]);
    await publish(client, "order.changed", id);
  });
}

async function remove(client, id) {
  await transaction(client, async () => {
    await client.query("DELETE FROM orders WHERE id = $1", [id]);
    await client.query("SELECT outbox.publish('order.deleted', 'order', $1, json_build_object('id', $1::text))", [id]);
  });
}

async function main() {
  const client = new Client(process.env.DATABASE_URL);
  await client.connect();
  try {
    const id = await place(client, "pen", 700);
    await add(client, id, "ink", 300);
    const refused = transaction(client, async () => {
      await client.query("UPDATE orders SET status = 'lost' WHERE id = $1", [id]);
      await publish(client, "order.changed", id);
      throw new Error("the business says no");
    });
    await refused.catch(() => {}); // Rolled back, the change and its event: it is never published.
    await remove(client, await place(client, "paper", 500));
    await client.query("NOTIFY outbox_event"); // After the commits: the relay looks at once, not only once a second.
  } finally {
    await client.end();
  }
}

module.exports = { place, add, remove };
if (require.main === module) main();
