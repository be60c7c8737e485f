use std::fmt;

use sqlx::{PgConnection, migrate::Migrator};

/// The schema that holds everything of the outbox.
pub const SCHEMA: &str = "outbox";

/// The outbox's migrations. Their record is kept in `outbox.migration`, so that the outbox can be
/// added to any database, whatever migrates the rest of it.
pub fn migrator() -> Migrator {
    let mut migrator = sqlx::migrate!("./migrations");
    migrator.dangerous_set_table_name("outbox.migration");
    migrator.create_schema(SCHEMA);
    migrator
}

/// Who publishes from a database, as stored there at `migrate`.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct Source {
    /// The publishing service, for example `shop`.
    pub name: String,
    /// 1, or after a restore or a failover that lost commits the time at which it was raised, in milliseconds since 1970.
    pub incarnation: i64,
    /// The incarnation that this one follows; none for the first.
    pub parent: Option<i64>,
    /// The last position that was handed out when the incarnation began; 0 for the first.
    pub began_at_position: i64,
}

/// As AMQP's `app_id` spells it: `shop`, and `shop~1764426123456` from the second incarnation on.
impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if self.incarnation > 1 { write!(f, "~{}", self.incarnation) } else { Ok(()) }
    }
}

/// Why a database did not get, or does not have, a source.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The schema is there, the name is not.
    #[error("this outbox has no source name; run: outbox-relay migrate --source NAME")]
    Missing,
    /// The name is taken for good: subscribers know this database's events by it.
    #[error(
        "this database already publishes as {stored:?}, so it cannot become {asked:?}; \
         leave out --source, or use --source {stored}"
    )]
    Taken {
        /// The name in the database.
        stored: String,
        /// The name that was asked for.
        asked: String,
    },
    /// The name is none.
    #[error(
        "{0:?} is no source name: it starts with a lower-case letter and goes on with at most 62 \
         lower-case letters, digits, '-' or '_'"
    )]
    Invalid(String),
    /// Texts would be other ones than their writers meant, or bytes that are none.
    #[error(
        "this database has the encoding {encoding}, and the outbox needs UTF8: its events are UTF-8. Create the \
         database anew: CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0, and move its contents there \
         with pg_dump"
    )]
    Encoding {
        /// The server's name of it.
        encoding: String,
    },
    /// The migrations did not run.
    #[error("the outbox schema could not be installed: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    /// The database did not answer as it should.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// Installs the outbox, or brings it up to date, and names its source. Running it again changes nothing.
/// Afterwards the session has `standard_conforming_strings` on, which the migrations rely on.
pub async fn install(conn: &mut PgConnection, name: &str) -> Result<Source, SourceError> {
    check_source_name(name)?;
    require_utf8(conn).await?;
    sqlx::query("SET standard_conforming_strings = on").execute(&mut *conn).await?;
    migrator().run(&mut *conn).await?;
    sqlx::query(
        "INSERT INTO outbox.source (name, server) VALUES ($1, outbox.server()) ON CONFLICT DO NOTHING",
    )
    .bind(name)
    .execute(&mut *conn)
    .await?;
    let stored = source(conn).await?;
    if stored.name == name {
        Ok(stored)
    } else {
        Err(SourceError::Taken { stored: stored.name, asked: name.to_owned() })
    }
}

/// Refuses a name that no source can have.
pub fn check_source_name(name: &str) -> Result<(), SourceError> {
    let valid = name.len() <= 63
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-".contains(&b));
    if valid { Ok(()) } else { Err(SourceError::Invalid(name.to_owned())) }
}

/// Refuses a database whose texts are not UTF-8.
pub async fn require_utf8(conn: &mut PgConnection) -> Result<(), SourceError> {
    let encoding: String =
        sqlx::query_scalar("SELECT current_setting('server_encoding')").fetch_one(conn).await?;
    if encoding == "UTF8" { Ok(()) } else { Err(SourceError::Encoding { encoding }) }
}

/// Reads who publishes from this database.
pub async fn source(conn: &mut PgConnection) -> Result<Source, SourceError> {
    sqlx::query_as("SELECT name, incarnation, parent, began_at_position FROM outbox.source")
        .fetch_optional(conn)
        .await?
        .ok_or(SourceError::Missing)
}
