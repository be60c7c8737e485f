// A service that has orders, as it was before the outbox: knex, no version column, and not a word of events.
//
// Its tables are those of ../sql/orders.sql. With ../sql/capture.sql, each transaction here publishes the orders that it
// changed, bulk statements and deletions included.

const makeKnex = require("knex");

async function place(knex, prices) {
  return knex.transaction(async (trx) => {
    const [{ id }] = await trx("orders").insert({}).returning("id");
    const lines = Object.entries(prices).map(([item, price]) => ({ order_id: id, item, price }));
    await trx("order_line").insert(lines);
    return id;
  });
}

async function pay(knex, id) {
  await knex.transaction(async (trx) => {
    await trx("orders").where({ id }).update({ status: "paid" });
    await trx("order_line").insert({ order_id: id, item: "shipping", price: 450 });
  });
}

async function main() {
  const knex = makeKnex({ client: "pg", connection: process.env.DATABASE_URL });
  try {
    await pay(knex, await place(knex, { pen: 700, ink: 300 }));
    const other = await place(knex, { ink: 300, paper: 500 });
    // One statement, whose rows are of many orders.
    await knex("order_line").where({ item: "ink" }).increment("price", 25);
    const trx = await knex.transaction();
    await trx("orders").where({ id: other }).update({ status: "lost" });
    await trx.rollback(); // Never published.
    const cancelled = await place(knex, { paper: 500 });
    await knex("orders").where({ id: cancelled }).update({ status: "cancelled" });
    // One statement; the database removes the lines.
    await knex("orders").where({ status: "cancelled" }).delete();
  } finally {
    await knex.destroy();
  }
}

if (require.main === module) main();
