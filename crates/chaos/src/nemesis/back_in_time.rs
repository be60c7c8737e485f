//! Databases that go back in time: a backup is restored, or a standby is promoted that lacked the last commits. Then an
//! operator follows `docs/operating/back-in-time.md`.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use anyhow::{Context, ensure};
use devstack::{ports, postgres::Postgres, roles};
use futures_util::future::try_join_all;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use tokio::sync::{Mutex, RwLock};

use super::{Records, recovery::Recovery, retry::until_done};
use crate::{
    fault::{Fault, Instance, Link},
    lost_time::{Loss, LostTime},
    oracle::{self, Outbox},
    proxy::LinkState,
    testbed::Testbed,
};

/// Held for writing while a copy of a database is taken, and from its return to the end of the procedure; and for reading
/// by each fault that leaves something to be repaired in a database. A copy that was taken during one would need the
/// repair again, and its operator knows one database, not two.
pub(super) static REPAIRS: RwLock<()> = RwLock::const_new(());
/// One lost time after the other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());
/// The database into which a backup is restored, until it takes the place of the other one.
const RESTORED: &str = "restored";

/// Takes a copy, lets the clients write on for so long, and puts the copy in the place of what they have written to.
pub(crate) async fn back_in_time(
    testbed: &Testbed,
    records: &Records<'_>,
    fault: Fault,
    lasts: Duration,
) -> anyhow::Result<()> {
    let _one = ONE_AT_A_TIME.lock().await;
    let copied = {
        let _none_is_open = REPAIRS.write().await;
        match fault {
            Fault::Restored => Copied::Backup(backup(testbed).await?),
            _ => Copied::Standby(Box::new(standby(testbed).await?)),
        }
    };
    tokio::time::sleep(lasts).await;
    let _none_is_open = REPAIRS.write().await;
    if let Copied::Backup(file) = &copied {
        restore(testbed, file).await?;
    }
    let sources: &[&'static str] =
        if matches!(copied, Copied::Backup(_)) { &["person"] } else { &["person", "score"] };
    let history = testbed.barrier.stop(sever(testbed)).await?;
    testbed.supervisor.fault_begins(&Instance::ALL);
    let mut sessions = try_join_all(sources.iter().map(|source| testbed.addresses.connect(source))).await?;
    let closed = close(testbed, sources).await;
    closed.context("the databases cannot be closed")?;
    // What is judged at the end of a run is judged here: no commit will be added, and this is all that will be known.
    let mut before = Vec::new();
    for session in &mut sessions {
        before.push(Outbox::load(session).await?);
    }
    if let (Some(outbox), Some(session)) = (before.first(), sessions.first_mut()) {
        let persons = oracle::persons(session).await?;
        records.judge(outbox, &persons, &history);
    }
    try_join_all(sessions.into_iter().map(Connection::close)).await?;
    match copied {
        Copied::Backup(_) => rename(testbed, records.count() + 1).await?,
        Copied::Standby(standby) => promote(testbed, *standby).await?,
    }
    let mut losses = Vec::new();
    let mut after = Vec::new();
    for (source, before) in sources.iter().zip(before) {
        let outbox = Outbox::load(&mut testbed.addresses.connect(source).await?).await?;
        losses.push(Loss::between(source, before, &outbox));
        after.push(outbox);
    }
    let persons = oracle::persons(&mut testbed.addresses.connect("person").await?).await?;
    let mut losses = losses.into_iter();
    let (person, score) = (losses.next().context("the source person")?, losses.next());
    let restored = after.first().context("the outbox of persons")?;
    records.lost(LostTime::new(person, score, restored, &persons), history);
    testbed.supervisor.fault_ends(&Instance::ALL);
    // As the page says: the writers may run meanwhile.
    let by_cpf: BTreeMap<i64, _> = persons.into_values().map(|person| (person.cpf, person)).collect();
    testbed.barrier.go_on(by_cpf);
    let recovery = Recovery { testbed, both: sources.len() == 2 };
    if let Err(error) = recovery.carry_out().await {
        records.not_recovered(format!("{fault}: {error:#}"));
    }
    for source in sources {
        let (incarnation, from_position, last): (i64, i64, i64) = until_done(async || {
            let sql =
                "SELECT s.incarnation, s.from_position, p.last_value FROM outbox.source s, outbox.position p";
            Ok(sqlx::query_as(sql).fetch_one(&mut testbed.addresses.connect(source).await?).await?)
        })
        .await?;
        records.recovered(source, incarnation, from_position, last);
    }
    testbed.barrier.recovered();
    Ok(())
}

/// Where a database can go back to.
enum Copied {
    Backup(PathBuf),
    Standby(Box<Postgres>),
}

/// A backup of the database of persons.
async fn backup(testbed: &Testbed) -> anyhow::Result<PathBuf> {
    let postgres = testbed.postgres.lock().await;
    let file = testbed.folder().path().join("person.dump");
    postgres.tool("pg_dump", &["-Fc", "-f", &file.to_string_lossy(), "person"]).await?;
    Ok(file)
}

/// Restores a backup into a new database, beside the one that it will replace.
async fn restore(testbed: &Testbed, backup: &std::path::Path) -> anyhow::Result<()> {
    let postgres = testbed.postgres.lock().await;
    let mut conn = testbed.addresses.connect("postgres").await?;
    conn.execute(AssertSqlSafe(format!("CREATE DATABASE {RESTORED}"))).await?;
    conn.close().await?;
    postgres.tool("pg_restore", &["-d", RESTORED, &backup.to_string_lossy()]).await?;
    // A dump has no rights on the database itself.
    let mut conn = testbed.addresses.connect(RESTORED).await?;
    roles::make(&mut conn, &[], &testbed.folder().secrets().postgres).await?;
    Ok(conn.close().await?)
}

/// The restored database takes the place of the other one, which goes on as `lost1`, `lost2`, ….
async fn rename(testbed: &Testbed, number: usize) -> anyhow::Result<()> {
    until_done(async || {
        let mut conn = testbed.addresses.connect("postgres").await?;
        conn.execute(AssertSqlSafe(format!("ALTER DATABASE person RENAME TO lost{number}"))).await?;
        Ok(conn.close().await?)
    })
    .await?;
    let mut conn = testbed.addresses.connect("postgres").await?;
    conn.execute(AssertSqlSafe(format!("ALTER DATABASE {RESTORED} RENAME TO person"))).await?;
    Ok(conn.close().await?)
}

/// A standby that has followed the server until now, and receives nothing any more.
async fn standby(testbed: &Testbed) -> anyhow::Result<Postgres> {
    let postgres = testbed.postgres.lock().await;
    let mut standby = postgres.standby(testbed.folder(), ports::free()).await?;
    standby.start().await?;
    receives(&standby, true).await.context("the standby does not follow")?;
    let mut conn = PgConnection::connect(&format!("{}/postgres", standby.url())).await?;
    conn.execute("ALTER SYSTEM SET primary_conninfo = ''").await?;
    conn.execute("SELECT pg_reload_conf()").await?;
    conn.close().await?;
    receives(&standby, false).await.context("the standby still follows")?;
    Ok(standby)
}

/// Waits until the standby streams, or until it does not.
async fn receives(standby: &Postgres, streams: bool) -> anyhow::Result<()> {
    let url = format!("{}/postgres", standby.url());
    until_done(async || {
        let mut conn = PgConnection::connect(&url).await?;
        let sql = "SELECT EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming')";
        let now: bool = sqlx::query_scalar(sql).fetch_one(&mut conn).await?;
        conn.close().await?;
        ensure!(now == streams, "it streams: {now}");
        Ok(())
    })
    .await
}

/// The server is lost, and the standby takes over its address.
async fn promote(testbed: &Testbed, mut standby: Postgres) -> anyhow::Result<()> {
    let mut postgres = testbed.postgres.lock().await;
    postgres.kill().await;
    standby.stop(&tokio_util::sync::CancellationToken::new()).await;
    standby.listen_at(postgres.port());
    standby.start().await?;
    let mut conn = testbed.addresses.connect("postgres").await?;
    let promoted: bool = sqlx::query_scalar("SELECT pg_promote()").fetch_one(&mut conn).await?;
    ensure!(promoted, "the standby was not promoted");
    conn.close().await?;
    *postgres = standby;
    Ok(())
}

/// Makes sure that no request of the clients is executed any more: there are none in person-api, on its links or in its
/// sessions.
async fn sever(testbed: &Testbed) -> anyhow::Result<()> {
    let links = [Link::Clients, Link::Database(Instance::PersonApi)];
    for link in links {
        testbed.set_link(link, LinkState::Cut);
    }
    testbed.supervisor.kill(Instance::PersonApi, Duration::ZERO).await?;
    end_sessions(testbed, "usename = 'person_api'").await?;
    for link in links {
        testbed.set_link(link, LinkState::Up);
    }
    Ok(())
}

/// Lets nobody into these databases any more, but for the present sessions of the superuser.
async fn close(testbed: &Testbed, databases: &[&str]) -> anyhow::Result<()> {
    for database in databases {
        let mut conn = testbed.addresses.connect("postgres").await?;
        conn.execute(AssertSqlSafe(format!("ALTER DATABASE {database} ALLOW_CONNECTIONS false"))).await?;
        conn.close().await?;
        end_sessions(testbed, &format!("datname = '{database}' AND usename <> 'postgres'")).await?;
    }
    Ok(())
}

/// Ends these sessions, and waits until they have ended.
async fn end_sessions(testbed: &Testbed, which: &str) -> anyhow::Result<()> {
    until_done(async || {
        let mut conn = testbed.addresses.connect("postgres").await?;
        let sql = format!(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE {which} AND pid <> pg_backend_pid()"
        );
        let left: i64 = sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&mut conn).await?;
        conn.close().await?;
        ensure!(left == 0, "{left} sessions have not ended");
        Ok(())
    })
    .await
}
