//! The check that a schema is the one that a program was built for.

use outbox::database::SharedSessions;
use sqlx::{AssertSqlSafe, PgConnection, migrate::Migrator};

/// Why a program does not start on a schema.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// Migrations are missing altogether or in part.
    #[error("the schema {schema} is {state} in this database; run: {command}")]
    NotCurrent {
        /// The schema.
        schema: &'static str,
        /// What it is instead of current.
        state: &'static str,
        /// What brings it up to date.
        command: &'static str,
    },
    /// A migration was applied in another wording than this program's.
    #[error(
        "migration {version} of the schema {schema} is not the one this program was built with; \
             the database belongs to another build, or a migration was edited after it landed"
    )]
    Different {
        /// The schema.
        schema: &'static str,
        /// The migration.
        version: i64,
    },
    /// The role may not look.
    #[error(
        "this role may not read {schema}.migration; connect as a role that may, or run: {command}, with the option that grants it"
    )]
    Forbidden {
        /// The schema.
        schema: &'static str,
        /// What grants it.
        command: &'static str,
    },
    /// The database refuses something that the program needs, until an operator changes it.
    #[error("{0}")]
    Unmet(String),
    /// A pooler gives the program's connections no sessions of their own.
    #[error(transparent)]
    SharedSessions(#[from] SharedSessions),
    /// The database did not respond. Unlike the others but `Unmet`, a retry can help.
    #[error("{}", outbox::database::reason(.0))]
    Database(#[from] sqlx::Error),
}

impl SchemaError {
    /// Whether waiting and trying again can help.
    pub fn passes(&self) -> bool {
        matches!(self, Self::Unmet(_) | Self::Database(_))
    }
}

/// A schema that a program needs.
#[derive(Debug)]
pub struct Schema {
    /// Its name; its migrations are recorded in `<name>.migration`.
    pub name: &'static str,
    /// What it should be.
    pub migrator: Migrator,
    /// What brings it up to date.
    pub command: &'static str,
}

impl Schema {
    /// Checks that every migration that this program knows was applied. A newer database is fine:
    /// migrations only add, and during a rollout the database goes first.
    pub async fn check(&self, conn: &mut PgConnection) -> Result<(), SchemaError> {
        let (schema, command) = (self.name, self.command);
        let applied = sqlx::query_as(AssertSqlSafe(self.applied())).fetch_all(conn).await;
        let applied: Vec<Applied> = applied.map_err(|error| {
            match error.as_database_error().and_then(sqlx::error::DatabaseError::code).as_deref() {
                // undefined_table, invalid_schema_name
                Some("42P01" | "3F000") => SchemaError::NotCurrent { schema, state: "missing", command },
                // insufficient_privilege
                Some("42501") => SchemaError::Forbidden { schema, command },
                _ => SchemaError::Database(error),
            }
        })?;
        self.compare(&applied)
    }

    /// A query for the migrations that were applied, as [`Applied`].
    pub(super) fn applied(&self) -> String {
        format!("SELECT '{0}', version, checksum FROM {0}.migration WHERE success", self.name)
    }

    pub(super) fn compare(&self, applied: &[Applied]) -> Result<(), SchemaError> {
        let (schema, command) = (self.name, self.command);
        for migration in self.migrator.iter() {
            match applied.iter().find(|(of, version, _)| of == schema && *version == migration.version) {
                None => return Err(SchemaError::NotCurrent { schema, state: "not current", command }),
                Some((_, version, checksum)) if checksum != migration.checksum.as_ref() => {
                    return Err(SchemaError::Different { schema, version: *version });
                }
                Some(_) => {}
            }
        }
        Ok(())
    }
}

/// Of which schema, which version, and its checksum.
pub(super) type Applied = (String, i64, Vec<u8>);
