//! Whether each connection has a session of its own. Behind a pooler in transaction mode, a connection gets another
//! session for each transaction: what it sets or prepares on a session is lost, or is another client's.

use sqlx::{PgConnection, Row};

/// What a connection has of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sessions {
    /// A session from its beginning to its end: PostgreSQL itself, or a pooler in session mode.
    Own,
    /// A session for each transaction, or for each statement.
    Shared,
}

/// How often the sessions are compared. A pooler that hands out the session that was used last is found the first time, and
/// so is one that hands them out in turn. The others are for one that has many other clients at this moment.
const ROUNDS: usize = 4;

/// The server's process, and which server that is: two servers may use one number. Read in the simple protocol, since a
/// pooler may lose what is prepared, and nothing is set, since the next client of the session would get it.
const SESSION: &str = "SELECT pg_catalog.pg_backend_pid() || ' ' \
                       || extract(epoch FROM pg_catalog.pg_postmaster_start_time())";

impl Sessions {
    /// By what a pooler does, whatever its name and its kind: the statements of `a` reach different sessions, or one that
    /// the statements of `b` reach, too.
    pub async fn of(a: &mut PgConnection, b: &mut PgConnection) -> sqlx::Result<Self> {
        let first = session(a).await?;
        for _ in 0..ROUNDS {
            // Twice: a pooler that hands out two sessions in turn would give each connection the same one each time.
            if session(a).await? != first || session(a).await? != first || session(b).await? == first {
                return Ok(Self::Shared);
            }
        }
        Ok(Self::Own)
    }

    /// As [`of`](Self::of), by one connection: a pooler that has a single session for now is not found.
    pub(super) async fn of_one(a: &mut PgConnection) -> sqlx::Result<Self> {
        let first = session(a).await?;
        for _ in 0..ROUNDS {
            if session(a).await? != first {
                return Ok(Self::Shared);
            }
        }
        Ok(Self::Own)
    }
}

async fn session(conn: &mut PgConnection) -> sqlx::Result<String> {
    sqlx::raw_sql(SESSION).fetch_one(conn).await?.try_get(0)
}
