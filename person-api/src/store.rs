//! All of the SQL: statements of more than a few lines are files in `store/sql/`. Each write is one statement, so it is
//! one transaction in one round trip: the rows, the aggregate's next version and the outbox event are committed together
//! or not at all. Only erasing a person takes more ([`erase`]).

pub mod erase;
pub mod idempotency;
mod items;
mod persons;
mod turns;
pub mod writes;

use std::{
    future::Future,
    ops::{Deref, DerefMut},
    time::Duration,
};

use daemon::config::database::Failure;
use events::Cpf;
pub use outbox::database::describe;
use sqlx::{PgConnection, PgPool, Postgres, error::DatabaseError, pool::PoolConnection};
use tokio::sync::OwnedSemaphorePermit;
use uuid::Uuid;
use web::front::Gate;

pub(crate) use self::items::Listed;
use self::{
    idempotency::{Added, Keyed},
    turns::{Turn, Turns},
};
pub use self::{persons::PersonPatch, turns::WRITES};

/// How many items of each kind the answer to `GET /person/{cpf}` holds at most, and a page of them.
pub const ITEMS_MAX: i32 = 1000;

/// How long a statement may take, on the wire and back. The server ends one earlier, by its
/// `statement_timeout`; this is for a server that says nothing any more.
const TIMEOUT: Duration = Duration::from_secs(8);

/// What a write left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// The record's id.
    pub id: Uuid,
    /// The id of the person that it is or belongs to.
    pub person_id: Uuid,
    /// The person's version that contains it.
    pub version: i64,
}

/// What a change did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is stored, with its event.
    Changed(Written),
    /// Everything was so already: no new version, no event.
    Unchanged(Written),
}

/// Why a write wrote nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Nobody has this cpf.
    UnknownPerson,
    /// The person has no such item.
    UnknownItem,
    /// Somebody has this cpf already.
    CpfExists,
    /// The person takes no new items.
    Inactive,
    /// The person is not, or not any more, in the state that the request is about.
    OtherState,
    /// The key was used before, for another body.
    KeyReused,
    /// The key was used before, for a record that went with its person.
    KeySpent,
}

/// The states that a change is for (`If-Match`): a person's id and version each.
#[derive(Clone, Debug, Default)]
pub struct States(pub Option<Vec<(Uuid, i64)>>);

impl States {
    fn columns(&self) -> (Option<Vec<Uuid>>, Option<Vec<i64>>) {
        self.0.as_ref().map(|states| states.iter().copied().unzip()).unzip()
    }
}

/// A person, or items of theirs, as JSON.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct Found {
    /// The person's id.
    pub id: Uuid,
    /// The person's version that this is.
    pub version: i64,
    /// As compact JSON.
    pub body: String,
}

/// Why there is no answer. Never shows what was sent or stored, which is personal data.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// As many requests use the database or wait for it as may; nothing was sent.
    #[error("as many requests need the database as may")]
    Overloaded,
    /// Others write about the same person, and it takes too long; nothing was stored.
    #[error("the person is busy")]
    Busy,
    /// The database does not respond, or gave the statement up; nothing was stored.
    #[error("{1}")]
    Unavailable(Failure, String),
    /// The connection was lost during a statement: a write may or may not have been stored.
    #[error("the database stopped answering: {0}")]
    Unknown(String),
    /// The database answers, and cannot store anything at the moment; nothing was stored.
    #[error("the database cannot store anything: {reason}")]
    CannotStore {
        /// What it lacks, for clients.
        what: &'static str,
        /// For operators.
        reason: String,
    },
    /// A defect of ours, or of the schema.
    #[error("the statement failed: {0}")]
    Failed(String),
}

impl StoreError {
    /// Of a read there is no outcome to be unsure of.
    fn of_a_read(self) -> Self {
        match self {
            Self::Unknown(why) => Self::Unavailable(Failure::Away, why),
            other => other,
        }
    }
}

/// The database, as the API sees it.
#[derive(Clone, Debug)]
pub struct Store {
    pool: PgPool,
    gate: Gate,
    turns: Turns,
}

/// A connection, and its place among those who need one.
struct Connection {
    conn: PoolConnection<Postgres>,
    _place: OwnedSemaphorePermit,
    /// Of a write.
    _turn: Option<Turn>,
}

impl Deref for Connection {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.conn
    }
}

impl DerefMut for Connection {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.conn
    }
}

impl Store {
    /// The pool's connections limit their statements themselves (`statement_timeout`).
    pub fn new(pool: PgPool) -> Self {
        Self { pool, gate: Gate::default(), turns: Turns::default() }
    }

    /// Takes no more requests at a time than `gate` lets in.
    #[must_use]
    pub fn behind(self, gate: Gate) -> Self {
        Self { gate, ..self }
    }

    /// Whatever goes wrong here, no statement was sent yet.
    async fn acquire(&self) -> Result<Connection, StoreError> {
        let place = self.gate.enter().ok_or(StoreError::Overloaded)?;
        let unavailable = |error| StoreError::Unavailable(Failure::of(&error), describe(&error));
        let conn = self.pool.acquire().await.map_err(unavailable)?;
        Ok(Connection { conn, _place: place, _turn: None })
    }

    /// The answer that is kept under the key. A retry waits for nobody who writes.
    async fn kept(&self, keyed: Option<&Keyed>) -> Result<Option<Added>, StoreError> {
        if keyed.is_none() {
            return Ok(None);
        }
        Keyed::find(keyed, &mut *self.acquire().await?).await
    }

    /// For a write about this person. It waits for its turn without a connection: those who write about one person
    /// wait for each other in any case, and must not hold what others need meanwhile.
    async fn acquire_for(&self, cpf: Cpf) -> Result<Connection, StoreError> {
        let turn = self.turns.take(cpf).await?;
        Ok(Connection { _turn: Some(turn), ..self.acquire().await? })
    }
}

/// Waits for a statement, but not for ever, and tells the ways apart in which it can fail.
async fn bounded<T>(statement: impl Future<Output = sqlx::Result<T>>) -> Result<T, StoreError> {
    bounded_by(TIMEOUT, statement).await
}

async fn bounded_by<T>(
    timeout: Duration,
    statement: impl Future<Output = sqlx::Result<T>>,
) -> Result<T, StoreError> {
    let error = match tokio::time::timeout(timeout, statement).await {
        Ok(Ok(answer)) => return Ok(answer),
        Ok(Err(error)) => error,
        Err(_) => return Err(StoreError::Unknown("no answer in time".to_owned())),
    };
    let described = describe(&error);
    let code = error.as_database_error().and_then(DatabaseError::code);
    if let Some(what) = code.as_deref().and_then(lacks) {
        return Err(StoreError::CannotStore { what, reason: described });
    }
    let failure = Failure::of(&error);
    Err(match failure {
        // A statement that was under way when the connection broke may have been committed.
        Failure::Away => StoreError::Unknown(described),
        // A row is locked for longer than a session waits for it.
        Failure::Locked => StoreError::Busy,
        Failure::Defect => StoreError::Failed(described),
        // The server says that it rolled the statement back.
        _ => StoreError::Unavailable(failure, described),
    })
}

/// What the server lacks to store anything, for whatever is sent to it. Not what is over in a moment: connections
/// (53300).
fn lacks(code: &str) -> Option<&'static str> {
    Some(match code {
        "53100" => "its disk is full",
        "53200" => "it is out of memory",
        "53400" => "a limit of its configuration is reached",
        "58030" => "it cannot write its files",
        _ => return None,
    })
}

#[cfg(test)]
mod plan;
