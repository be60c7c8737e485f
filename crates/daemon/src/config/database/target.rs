//! Where a database is, and what each session of it is set to before anything else is asked of it.

use std::{collections::BTreeMap, fmt::Write as _, str::FromStr, sync::Arc, time::Duration};

use outbox::database::SharedSessions;
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, PgConnection, PgPool, Postgres, Transaction,
    postgres::{PgConnectOptions, PgPoolOptions, PgSslMode},
};
use tokio::{sync::OnceCell, time::timeout};

use super::Sessions;

/// A connection that was used so recently is there still, but for the rarest of cases.
const FRESH: Duration = Duration::from_millis(100);

/// To find out whether sessions are shared takes no longer. A pooler that has no second session to give would keep a
/// connection waiting for minutes.
const PROBE: Duration = Duration::from_secs(4);

/// `too_many_connections`, of a role, a database or the server.
const NO_PLACE: &str = "53300";

/// What our SQL relies on, whatever the defaults of the server, the database and the role are. Not
/// `default_transaction_read_only`: an operator who sets it means it, and readiness says so.
const RELIED_ON: [(&str, &str); 15] = [
    // Under another isolation, every second of two concurrent writes to one row fails (40001).
    ("default_transaction_isolation", "read committed"),
    ("default_transaction_deferrable", "off"),
    // Otherwise a backslash in our SQL, or in a view or a function that it makes, means something else.
    ("standard_conforming_strings", "on"),
    ("search_path", "pg_catalog, pg_temp"),
    ("client_encoding", "UTF8"),
    ("DateStyle", "ISO, MDY"),
    ("IntervalStyle", "postgres"),
    ("TimeZone", "UTC"),
    ("bytea_output", "hex"),
    ("extra_float_digits", "1"),
    // Rows that row security would hide are an error that can be seen, not rows that are missing.
    ("row_security", "off"),
    // `statement_timeout` is the limit: a lock is waited for as long as a statement may take.
    ("lock_timeout", "0"),
    ("idle_session_timeout", "0"),
    ("idle_in_transaction_session_timeout", "30s"),
    // TCP notices a dead peer within 10 s: this is the server's half of it.
    ("tcp_user_timeout", "10s"),
];

/// A setting that not every system has (a statement ends soon after its client was killed, and does not run on for
/// minutes); one that PostgreSQL has from 17 on; and one that may be stricter than ours: `remote_apply` stays, `off` would
/// lose in a crash what was reported or acknowledged.
fn conditional(is_local: bool) -> String {
    format!(
        "CASE WHEN version() ~ '(linux|darwin|bsd)'
              THEN set_config('client_connection_check_interval', '1s', {is_local}) END,
         CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL
              THEN set_config('transaction_timeout', '0', {is_local}) END,
         CASE WHEN current_setting('synchronous_commit') = 'off'
              THEN set_config('synchronous_commit', 'on', {is_local}) END"
    )
}

/// Settings that mean nothing within a transaction, or are about a connection that is the pooler's.
const OF_A_SESSION: [&str; 4] = [
    "default_transaction_isolation",
    "default_transaction_deferrable",
    "idle_session_timeout",
    "tcp_user_timeout",
];

/// How to connect: the address, the user, and the settings of the session.
///
/// The settings are one statement after connecting and not parameters of the connection: `PgBouncer` refuses those, or
/// drops them without a word. Before anything is set, the first connection finds out whether a pooler would give the session
/// to another client. Such connections are refused, unless the program [shares](Self::sharing) sessions.
#[derive(Clone, Debug)]
pub struct Database {
    options: PgConnectOptions,
    settings: BTreeMap<&'static str, String>,
    sessions: Arc<OnceCell<Sessions>>,
    shares: bool,
    /// One connection is all that the program needs.
    alone: bool,
}

impl From<PgConnectOptions> for Database {
    fn from(options: PgConnectOptions) -> Self {
        let settings = RELIED_ON.map(|(name, value)| (name, value.to_owned())).into();
        // `PgBouncer` knows this parameter of the connection as little as others; it is set afterwards.
        Self {
            options: options.extra_float_digits(None),
            settings,
            sessions: Arc::default(),
            shares: false,
            alone: false,
        }
    }
}

/// From a URL, as the driver understands it.
impl FromStr for Database {
    type Err = sqlx::Error;

    fn from_str(url: &str) -> sqlx::Result<Self> {
        Ok(url.parse::<PgConnectOptions>()?.into())
    }
}

impl Database {
    /// With another value of a setting. `name` and `value` are the program's own words.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.settings.insert(name, value.into());
        self
    }

    /// For a program that needs no session of its own. Each use of a connection is a transaction that
    /// [`begin`](Self::begin) begins, and its statements have no names, if [`are_shared`](Self::are_shared).
    #[must_use]
    pub fn sharing(self) -> Self {
        Self { shares: true, ..self }
    }

    /// For a command, which needs one connection. Where the server has no place for a second one, the first one alone is
    /// compared with itself.
    #[must_use]
    pub fn alone(self) -> Self {
        Self { alone: true, ..self }
    }

    /// Finds out anew whether sessions are shared, with the next connection.
    #[must_use]
    pub fn anew(self) -> Self {
        Self { sessions: Arc::default(), ..self }
    }

    /// Under another name in `pg_stat_activity`.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.options = self.options.application_name(name);
        self
    }

    /// For a program whose every statement is meant to be done by an index, and to have one plan.
    #[must_use]
    pub fn by_index(self) -> Self {
        // To plan anew for each value would take the server longer than the execution does, of a partitioned
        // table above all.
        self.with("plan_cache_mode", "force_generic_plan")
            // A plan that was made while a table was small is kept while it grows.
            .with("enable_seqscan", "off")
            .with("enable_indexscan", "on")
            .with("enable_indexonlyscan", "on")
            .with("enable_nestloop", "on")
            // What has no index, such as a sequence, seems so expensive then that it would be compiled, for 12 ms.
            .with("jit", "off")
            // For the same reason it would seem worth workers of its own, which are processes to start, for 20 ms.
            .with("max_parallel_workers_per_gather", "0")
    }

    /// Without statements in the log.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.options = self.options.disable_statement_logging();
        self
    }

    /// The address and the user, without the password.
    pub fn address(&self) -> String {
        let options = &self.options;
        let (user, port) = (options.get_username(), options.get_port());
        let database = options.get_database().unwrap_or(user);
        if let Some(socket) = self.socket() {
            return format!("postgres://{user}@/{database} (socket {socket}, port {port})");
        }
        let (host, mode) = (options.get_host(), options.get_ssl_mode());
        format!("postgres://{user}@{host}:{port}/{database} (sslmode {mode:?})")
    }

    fn socket(&self) -> Option<String> {
        let socket = self.options.get_socket().map(|path| path.display().to_string());
        socket.or_else(|| Some(self.options.get_host().to_owned()).filter(|host| host.starts_with('/')))
    }

    /// Why what goes over the wire may be read or changed on its way: where the server is another machine and TLS
    /// is not certain.
    pub fn exposed(&self) -> Option<String> {
        let (host, mode) = (self.options.get_host(), self.options.get_ssl_mode());
        let certain = !matches!(mode, PgSslMode::Disable | PgSslMode::Allow | PgSslMode::Prefer);
        (!certain && self.socket().is_none() && !crate::config::is_this_machine(host)).then(|| {
            format!(
                "the connection to PostgreSQL on {host} may be without TLS (sslmode {mode:?}); set \
                 sslmode=verify-full in the URL, with sslrootcert where the machine does not know the authority"
            )
        })
    }

    /// Warns where [`exposed`](Self::exposed) has something to say. For the start of a program.
    pub fn warn(&self) {
        if let Some(exposed) = self.exposed() {
            tracing::warn!("{exposed}; --require-tls makes this an error");
        }
    }

    /// The settings as one statement, for the session or for the transaction that it is in.
    fn sql(&self, is_local: bool) -> String {
        let mut sql = "SELECT ".to_owned();
        for (name, value) in &self.settings {
            if is_local && OF_A_SESSION.contains(name) {
                continue;
            }
            let value = value.replace('\'', "''");
            let _never = write!(sql, "set_config('{name}', '{value}', {is_local}), ");
        }
        sql + &conditional(is_local)
    }

    /// Sets a session that was opened in another way, before anything else is asked of it. Fails with
    /// [`SharedSessions`] when the connection has no session of its own.
    pub async fn prepare(&self, conn: &mut PgConnection) -> sqlx::Result<()> {
        // Boxed: a large future, and needed once.
        match self.sessions.get_or_try_init(|| Box::pin(self.probe(conn))).await? {
            Sessions::Own => {
                sqlx::raw_sql(AssertSqlSafe(self.sql(false))).execute(conn).await?;
            }
            Sessions::Shared if self.shares => {}
            Sessions::Shared => return Err(SharedSessions.into()),
        }
        Ok(())
    }

    async fn probe(&self, conn: &mut PgConnection) -> sqlx::Result<Sessions> {
        let probe = async {
            let mut second = match self.options.connect().await {
                Err(sqlx::Error::Database(error))
                    if self.alone && error.code().as_deref() == Some(NO_PLACE) =>
                {
                    return Sessions::of_one(conn).await;
                }
                second => second?,
            };
            let sessions = Sessions::of(conn, &mut second).await?;
            second.close().await?;
            Ok(sessions)
        };
        let sessions = timeout(PROBE, probe).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))?;
        if sessions == Sessions::Shared && self.shares {
            tracing::info!(
                "a pooler shares sessions; each request to the database is a transaction with its own settings"
            );
        }
        Ok(sessions)
    }

    /// Whether a pooler shares the sessions of this program's connections, as its first connection has found out.
    pub fn are_shared(&self) -> bool {
        self.sessions.get() == Some(&Sessions::Shared)
    }

    /// Fails when sessions are shared, and this program needs its own. What else is the matter is not an error here:
    /// connections will show it.
    pub(super) async fn refuse_shared(&self) -> Result<(), SharedSessions> {
        let is_known = self.shares || self.sessions.initialized();
        if !is_known && let Ok(Ok(conn)) = timeout(2 * PROBE, self.connect()).await {
            let _ = timeout(PROBE, conn.close()).await;
        }
        if self.are_shared() && !self.shares { Err(SharedSessions) } else { Ok(()) }
    }

    /// A connection of its own.
    pub async fn connect(&self) -> sqlx::Result<PgConnection> {
        let mut conn = self.options.connect().await?;
        self.prepare(&mut conn).await?;
        Ok(conn)
    }

    /// Begins a transaction, with the settings where its session is shared. One round trip in either case.
    pub async fn begin<'c>(&self, conn: &'c mut PgConnection) -> sqlx::Result<Transaction<'c, Postgres>> {
        if !self.are_shared() {
            return conn.begin().await;
        }
        conn.begin_with(AssertSqlSafe(format!("BEGIN ISOLATION LEVEL READ COMMITTED; {}", self.sql(true))))
            .await
    }

    /// A pool that connects when it is first used, so that a program starts while its database is away and
    /// says so in its readiness.
    ///
    /// A connection that has lain idle is asked whether it is there before it is used. One that is just back is
    /// not: the pool has asked it then, and a round trip for each statement would be for nothing.
    pub fn pool(&self, size: u32) -> PgPool {
        let options = PgPoolOptions::new()
            .max_connections(size)
            .test_before_acquire(false)
            .before_acquire(|conn, idle| {
                Box::pin(async move { Ok(idle.idle_for < FRESH || conn.ping().await.is_ok()) })
            })
            .acquire_timeout(Duration::from_secs(5))
            .idle_timeout(Duration::from_mins(5));
        self.pool_of(options)
    }

    /// How to connect, for a pool that does more after connecting: [`prepare`](Self::prepare) first.
    pub fn options(&self) -> PgConnectOptions {
        self.options.clone()
    }

    /// A pool with `options`, but for what is done after connecting.
    pub fn pool_of(&self, options: PgPoolOptions) -> PgPool {
        let database = self.clone();
        let options = options.after_connect(move |conn, _| {
            let database = database.clone();
            Box::pin(async move { database.prepare(conn).await })
        });
        options.connect_lazy_with(self.options.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database(url: &str) -> Database {
        url.parse().unwrap()
    }

    #[test]
    fn an_address_is_what_it_is() {
        for (url, address) in [
            ("postgres://u:p@db:5433/d", "postgres://u@db:5433/d (sslmode Prefer)"),
            (
                "postgres://u:p@localhost/d?host=/run/pg&port=6432",
                "postgres://u@/d (socket /run/pg, port 6432)",
            ),
            ("postgres://u:p@%2Frun%2Fpg/d", "postgres://u@/d (socket /run/pg, port 5432)"),
        ] {
            assert_eq!(database(url).address(), address);
        }
    }

    #[test]
    fn only_another_machine_without_certain_tls_is_exposed() {
        for url in [
            "postgres://u@db/d",
            "postgres://u@10.0.0.7/d?sslmode=prefer",
            "postgres://u@db/d?sslmode=disable",
            "postgres://u@[fd00::7]/d?sslmode=allow",
            "postgres://u@localhost.example/d",
        ] {
            assert!(database(url).exposed().is_some(), "{url}");
        }
        for url in [
            "postgres://u@db/d?sslmode=require",
            "postgres://u@db/d?sslmode=verify-full",
            "postgres://u@localhost/d",
            "postgres://u@shop.localhost/d",
            "postgres://u@127.0.0.9/d?sslmode=disable",
            "postgres://u@[::1]/d",
            "postgres://u@db/d?host=/run/postgresql",
        ] {
            assert_eq!(database(url).exposed(), None, "{url}");
        }
    }
}
