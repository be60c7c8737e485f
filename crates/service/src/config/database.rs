//! The connection to PostgreSQL, and the check that its schema is the one this program was built for.

use std::{path::PathBuf, time::Duration};

use secrecy::ExposeSecret;
use sqlx::{
    AssertSqlSafe, Connection, PgConnection, PgPool,
    migrate::Migrator,
    postgres::{PgConnectOptions, PgPoolOptions},
};

use super::{SettingError, parse_secret, secret};

const FORM: &str = "postgres://user:password@host:5432/database";

/// Where the database is. The URL itself is a secret: set `DATABASE_URL`, or name a file that holds it.
#[derive(Clone, Debug, clap::Args)]
pub struct DatabaseArgs {
    /// A file that holds the PostgreSQL URL, instead of the variable `DATABASE_URL`
    /// (`postgres://user:password@host:5432/database`).
    #[arg(long, env = "DATABASE_URL_FILE", value_name = "PATH")]
    pub database_url_file: Option<PathBuf>,
}

impl DatabaseArgs {
    /// How to connect, under the program's name, with every statement limited to `statement_timeout`.
    /// TCP notices a dead peer within 10 s (`tcp_user_timeout` is the server's half of it).
    pub fn options(
        &self,
        application: &str,
        statement_timeout: Duration,
    ) -> Result<PgConnectOptions, SettingError> {
        options("DATABASE_URL", self.database_url_file.as_ref(), application, statement_timeout)
    }
}

/// As [`DatabaseArgs::options`], for another database: its URL is in the variable `name`, or in `file`.
pub fn options(
    name: &str,
    file: Option<&PathBuf>,
    application: &str,
    statement_timeout: Duration,
) -> Result<PgConnectOptions, SettingError> {
    let url = secret(name, file, FORM)?;
    // sqlx takes any scheme, and would go and look for PostgreSQL at a MySQL server.
    if !["postgres://", "postgresql://"].iter().any(|scheme| url.expose_secret().starts_with(scheme)) {
        return Err(SettingError::new(name, format_args!("should look like {FORM}")));
    }
    let options: PgConnectOptions = parse_secret(name, &url, FORM)?;
    readable(name, url.expose_secret())?;
    let statement_timeout = statement_timeout.as_millis().to_string();
    Ok(options.application_name(application).options([
        ("statement_timeout", statement_timeout.as_str()),
        ("idle_in_transaction_session_timeout", "30s"),
        ("tcp_user_timeout", "10s"),
    ]))
}

/// For a program whose every statement is meant to be done by an index, and to have one plan.
pub fn by_index(options: PgConnectOptions) -> PgConnectOptions {
    options.options([
        // To plan anew for each value would take the server longer than the execution does, of a partitioned
        // table above all.
        ("plan_cache_mode", "force_generic_plan"),
        // A plan that was made while a table was small is kept while it grows.
        ("enable_seqscan", "off"),
        // What has no index, such as a sequence, seems so expensive then that it would be compiled, for 12 ms.
        ("jit", "off"),
        // For the same reason it would seem worth workers of its own, which are processes to start, for 20 ms.
        ("max_parallel_workers_per_gather", "0"),
    ])
}

/// Where `options` lead, and as whom, without the password.
pub fn address(options: &PgConnectOptions) -> String {
    let (user, host, port) = (options.get_username(), options.get_host(), options.get_port());
    let database = options.get_database().unwrap_or(user);
    format!("postgres://{user}@{host}:{port}/{database} (sslmode {:?})", options.get_ssl_mode())
}

/// Checks that the files are there that the URL names: otherwise it would be seen at the first connection.
fn readable(setting: &str, url: &str) -> Result<(), SettingError> {
    let Ok(url) = url::Url::parse(url) else { return Ok(()) };
    for (name, path) in url.query_pairs() {
        if matches!(&*name, "sslrootcert" | "sslcert" | "sslkey") {
            std::fs::File::open(&*path).map_err(|error| {
                SettingError::new(setting, format_args!("{name}: cannot read {path}: {error}"))
            })?;
        }
    }
    Ok(())
}

/// A connection that was used so recently is there still, but for the rarest of cases.
const FRESH: Duration = Duration::from_millis(100);

/// A pool that connects when it is first used, so that a program starts while its database is away and
/// says so in its readiness.
///
/// A connection that has lain idle is asked whether it is there before it is used. One that is just back is
/// not: the pool has asked it then, and a round trip for each statement would be for nothing.
pub fn pool(options: PgConnectOptions, size: u32) -> PgPool {
    PgPoolOptions::new()
        .max_connections(size)
        .test_before_acquire(false)
        .before_acquire(|conn, idle| {
            Box::pin(async move { Ok(idle.idle_for < FRESH || conn.ping().await.is_ok()) })
        })
        .acquire_timeout(Duration::from_secs(5))
        .idle_timeout(Duration::from_mins(5))
        .connect_lazy_with(options)
}

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
    #[error("this role may not read {schema}.migration; run: {command}, with the option that grants it")]
    Forbidden {
        /// The schema.
        schema: &'static str,
        /// What grants it.
        command: &'static str,
    },
    /// The database did not answer. Worth another try, unlike the others.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
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
    fn applied(&self) -> String {
        format!("SELECT '{0}', version, checksum FROM {0}.migration WHERE success", self.name)
    }

    fn compare(&self, applied: &[Applied]) -> Result<(), SchemaError> {
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
type Applied = (String, i64, Vec<u8>);

/// Checks several schemas, in one statement when they are there.
pub async fn check(conn: &mut PgConnection, schemas: &[Schema]) -> Result<(), SchemaError> {
    let each: Vec<String> = schemas.iter().map(Schema::applied).collect();
    match sqlx::query_as(AssertSqlSafe(each.join(" UNION ALL "))).fetch_all(&mut *conn).await {
        Ok(applied) => schemas.iter().try_for_each(|schema| schema.compare(&applied)),
        // Alone, each says which one it is.
        Err(sqlx::Error::Database(_)) => {
            for schema in schemas {
                schema.check(conn).await?;
            }
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// Checks `schemas` as soon as the database answers, with `waiting` told why it does not yet. Ends with
/// an error when a schema is not what the program needs; waiting would not change that. `stop` ends
/// the wait early, with `false`.
pub async fn wait_until_current(
    pool: &PgPool,
    schemas: &[Schema],
    stop: &tokio_util::sync::CancellationToken,
    mut waiting: impl FnMut(&sqlx::Error),
) -> Result<bool, SchemaError> {
    let mut pause = Duration::from_millis(100);
    loop {
        let attempt = async { check(&mut *pool.acquire().await?, schemas).await };
        // The attempt too: while the database is away it lasts as long as the pool waits for a connection.
        match stop.run_until_cancelled(attempt).await {
            None => return Ok(false),
            Some(Ok(())) => return Ok(true),
            Some(Err(SchemaError::Database(error))) => waiting(&error),
            Some(Err(fatal)) => return Err(fatal),
        }
        if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
            return Ok(false);
        }
        pause = (pause * 2).min(Duration::from_secs(2));
    }
}
