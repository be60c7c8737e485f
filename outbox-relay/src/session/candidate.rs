//! A session that may lead: it checks the database, waits for the lock, and begins a leadership.

use std::time::Duration;

use daemon::config::database::Database;
use outbox::Source;
use sqlx::{Connection, PgConnection};

use super::{Begin, LeaderSession, SessionError, Watch, needs, within_timeout};
use crate::{lease::Lease, message::Origin, position::Positions, reader::Reader};

/// A relay's row as a leadership begins: its epoch, `low_water`, `high`, the ends of its open ranges, and those of what
/// was dropped by hand above `low_water`.
type StoredProgress = (i64, i64, i64, Vec<i64>, Vec<i64>, Vec<i64>, Vec<i64>);

/// A leader that has stored no heartbeat for so long, and whose session is there all the same, is ended
/// by one that stands by: the server does not call a session idle that is in the middle of a statement.
const SILENCE: Duration = Duration::from_secs(15);

/// A relay that may lead: connected to a database that is as it should be.
#[derive(Debug)]
pub struct CandidateSession {
    conn: PgConnection,
    relay_id: i32,
    name: String,
    identity: String,
    lease: Duration,
    /// Who publishes from this database, without the incarnation.
    pub source: String,
}

impl CandidateSession {
    /// Connects, checks the schema, and registers the relay name where it is new. `lease`: how long the
    /// session may say nothing before the server ends it, and with it whatever leadership it has.
    pub async fn connect(
        database: &Database,
        name: &str,
        begin: Begin,
        identity: &str,
        lease: Duration,
    ) -> Result<Self, SessionError> {
        let milliseconds = lease.as_millis().to_string();
        // Anew each time: a pooler may have come between.
        let database = database.clone().quiet().anew();
        // A leader that is stopped, or whose host is gone without a word, would otherwise keep the
        // others out for ever. While the server has something to say to it, it is the second one.
        let leading = database.with("idle_session_timeout", milliseconds.as_str());
        let mut conn =
            within_timeout(leading.with("tcp_user_timeout", milliseconds.as_str()).connect()).await?;
        // Before anything else: a standby answers queries, but not with what is true.
        if within_timeout(sqlx::query_scalar("SELECT pg_is_in_recovery()").fetch_one(&mut conn)).await? {
            return Err(SessionError::InRecovery);
        }
        within_timeout(outbox::require_utf8(&mut conn)).await?;
        within_timeout(needs().check(&mut conn)).await?;
        let source = within_timeout(outbox::source(&mut conn)).await?.name;
        // Our own small commits are what makes other people's asynchronous ones durable.
        within_timeout(sqlx::query("SET synchronous_commit = on").execute(&mut conn)).await?;

        let register = sqlx::query(
            "INSERT INTO outbox.relay (name, low_water, high, told_from)
             SELECT $1, mark, mark, mark
             FROM (SELECT CASE WHEN $2 AND is_called THEN last_value ELSE 0 END AS mark FROM outbox.position) m
             WHERE NOT EXISTS (SELECT FROM outbox.relay WHERE name = $1)
             ON CONFLICT (name) DO NOTHING",
        );
        within_timeout(register.bind(name).bind(begin == Begin::End).execute(&mut conn)).await?;
        let relay_id: i32 = within_timeout(
            sqlx::query_scalar("SELECT id FROM outbox.relay WHERE name = $1").bind(name).fetch_one(&mut conn),
        )
        .await?;
        Ok(Self { conn, relay_id, name: name.to_owned(), identity: identity.to_owned(), lease, source })
    }

    /// Asks for leadership; false when another relay has it. Ask again well within the lease.
    pub async fn ask(&mut self) -> Result<bool, SessionError> {
        // A session lock. The server releases it when the session ends, however it ends.
        let ask = sqlx::query_as(
            "SELECT outbox.try_lead($1),
                    coalesce(heartbeat_at < clock_timestamp() - $2 * interval '1 second', false)
             FROM outbox.relay WHERE id = $1",
        );
        let ask = ask.bind(self.relay_id).bind(SILENCE.as_secs_f64());
        let (leads, silent): (bool, bool) = within_timeout(ask.fetch_one(&mut self.conn)).await?;
        if !leads && silent {
            let end = sqlx::query_scalar::<_, bool>(
                "SELECT pg_terminate_backend(pid) FROM outbox.leader_session WHERE relay_id = $1",
            );
            match within_timeout(end.bind(i64::from(self.relay_id)).fetch_optional(&mut self.conn)).await {
                Ok(ended) => tracing::warn!(?ended, "the leader says nothing; its session is ended"),
                // Another role's session, for example.
                Err(SessionError::Database(sqlx::Error::Database(error))) => {
                    tracing::warn!(error = error.message(), "the leader says nothing, and cannot be ended");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(leads)
    }

    /// Begins the leadership that [`ask`](Self::ask) got.
    pub async fn lead(mut self) -> Result<LeaderSession, SessionError> {
        let begin = sqlx::query_as(
            "UPDATE outbox.relay
             SET epoch = epoch + 1, leader = $2, leader_since = now(), heartbeat_at = now(), waiting = '[]'
             WHERE id = $1
             RETURNING epoch, low_water, high,
                       ARRAY(SELECT lower(r) FROM unnest(open) r), ARRAY(SELECT upper(r) - 1 FROM unnest(open) r),
                       ARRAY(SELECT lower(r) FROM unnest(dropped_by_hand) r WHERE upper(r) > low_water + 1),
                       ARRAY(SELECT upper(r) FROM unnest(dropped_by_hand) r WHERE upper(r) > low_water + 1)",
        );
        let (epoch, low_water, high, from, to, dropped_from, dropped_to): StoredProgress =
            within_timeout(begin.bind(self.relay_id).bind(&self.identity).fetch_one(&mut self.conn)).await?;
        // A statement of its own, after the epoch was raised: a subquery of that UPDATE would read the source as it was
        // before the UPDATE waited for a new incarnation. And fenced: a new incarnation raises the epoch as well.
        let under = sqlx::query_as(
            "WITH source AS MATERIALIZED (SELECT name, incarnation, parent, began_at_position FROM outbox.source),
                  leads AS (
                UPDATE outbox.relay r SET incarnation = s.incarnation FROM source s
                WHERE r.id = $1 AND r.epoch = $2
                RETURNING r.id)
             SELECT s.* FROM source s CROSS JOIN leads",
        );
        let source: Option<Source> =
            within_timeout(under.bind(self.relay_id).bind(epoch).fetch_optional(&mut self.conn)).await?;
        let origin = Origin::from(&source.ok_or(SessionError::Deposed)?);

        let (last_value, stored): (i64, i64) = within_timeout(
            sqlx::query_as(
                "SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END,
                        coalesce((SELECT max(position) FROM outbox.event), 0)
                 FROM outbox.position",
            )
            .fetch_one(&mut self.conn),
        )
        .await?;
        // `high` counts as well: it was read, so it had been handed out.
        let mark = low_water.max(high).max(stored);
        if last_value < mark {
            return Err(SessionError::SequenceBehind { last_value, mark });
        }

        let open: Vec<(i64, i64)> = from.into_iter().zip(to).collect();
        tracing::info!(relay = self.name, source = %origin, epoch, low_water, high, open = open.len(), "leading");
        let mut leader = LeaderSession {
            conn: self.conn,
            reader: Reader::new(Positions::restore(high, open.iter().copied())),
            relay_id: self.relay_id,
            name: self.name,
            epoch,
            stored: (low_water, high, open),
            dropped: Vec::new(),
            dropped_by_hand: dropped_from.into_iter().zip(dropped_to).map(|(from, to)| from..to).collect(),
            unreadable: Vec::new(),
            lease: Lease::new(self.lease),
            origin,
            paused: None,
        };
        leader.save("[]").await?;
        Ok(leader)
    }

    /// Shows how the database is, if it is time to.
    pub async fn watch(&mut self, watch: &mut Watch) -> Result<(), SessionError> {
        watch.look_if_due(&mut self.conn).await
    }

    /// Goes away in good order.
    pub async fn close(self) {
        let _ = within_timeout(self.conn.close()).await;
    }
}
