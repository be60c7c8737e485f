//! Two that change one order at the same time: the last event has the lines of both. A body that was read before the lock
//! would lack one of them.

use std::{fs, path::Path};

use devstack::testing::until;
use sqlx::Executor;

use crate::{
    packages::source,
    programs::Program,
    writers::{Way, Writer},
};

/// The part of a file in SQL that changes the order whose id is the variable `id`.
fn change(file: &str) -> String {
    let text = fs::read_to_string(source(&format!("sql/{file}"))).unwrap();
    let (_, text) = text.split_once("-- A change").unwrap();
    let (change, _) = text.split_once("-- What is rolled back").unwrap();
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("change-{file}"));
    fs::write(&path, format!("-- A change{change}")).unwrap();
    path.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn the_last_event_has_what_both_have_written() {
    let python = "import os, psycopg, publish\n\
                  publish.add(psycopg.connect(os.environ['DATABASE_URL'], autocommit=True), 1, 'ink', 3)";
    let node = "const { Client } = require(`${process.env.EXAMPLES}/node_modules/pg`);\n\
                const { add } = require(`${process.env.EXAMPLES}/publish.js`);\n\
                const client = new Client(process.env.DATABASE_URL);\n\
                client.connect().then(() => add(client, '1', 'ink', 3)).then(() => client.end());";
    // What holds both of them up: the order's row, or its lock in the outbox.
    let (row, lock) = ("SELECT FROM orders FOR UPDATE", "SELECT outbox.lock('order', '1')");
    for (file, way, holds) in [
        ("insert.sql", Way::Insert, row),
        ("publish.sql", Way::Publish, lock),
        ("publish.py", Way::Publish, lock),
        ("publish.js", Way::Publish, lock),
    ] {
        let writer = Writer::new(file, way).await;
        writer.write().await;
        let change = match file.rsplit_once('.').unwrap().1 {
            "sql" => Program::psql(&writer.url, &[&change(file)]).args(&["-v", "id=1"]),
            "py" => Program::python(&["-c", python]).await,
            _ => Program::node(&["-e", node]).await,
        };
        let change = change.env("DATABASE_URL", &writer.url);
        let lines = "SELECT json_array_length(payload -> 'lines') FROM outbox.event
                     WHERE aggregate_id = '1' ORDER BY version DESC LIMIT 2";
        let mut holder = writer.pool.begin().await.unwrap();
        holder.execute(holds).await.unwrap();
        tokio::join!(change.run(), change.run(), async {
            let blocked = "SELECT count(*) = 2 FROM pg_stat_activity
                           WHERE datname = current_database() AND wait_event_type = 'Lock'";
            until("both wait for the lock", async || {
                sqlx::query_scalar(blocked).fetch_one(&writer.pool).await.unwrap()
            })
            .await;
            holder.rollback().await.unwrap();
        });
        let lines: Vec<i32> = sqlx::query_scalar(lines).fetch_all(&writer.pool).await.unwrap();
        assert_eq!(lines, [4, 3], "{file}");
    }
}
