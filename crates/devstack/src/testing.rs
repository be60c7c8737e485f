//! What tests need of the private servers that `devstack run -- COMMAND` starts around them: a fresh
//! database and a fresh virtual host each, so that tests neither wait for nor see each other.

#![expect(
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "for tests only, where a panic is the report"
)]

mod document;
pub mod raw;
mod wait;

use sqlx::{AssertSqlSafe, Connection, PgConnection};
use uuid::Uuid;

pub use self::{
    document::Document,
    wait::{DEADLINE, client, eventually, is_progress, until},
};
use crate::{servers::Servers, users};

/// A superuser's URL of the private PostgreSQL, without a database.
pub const POSTGRES_URL: &str = "DEVSTACK_POSTGRES_URL";
/// An administrator's URL of the private RabbitMQ, without a virtual host.
pub const AMQP_URL: &str = "DEVSTACK_AMQP_URL";
/// The private RabbitMQ's management API, with the administrator's name and password.
pub const MANAGEMENT_URL: &str = "DEVSTACK_MANAGEMENT_URL";

/// Where a test's servers are.
#[derive(Clone, Debug)]
pub struct Place {
    /// A superuser's URL of PostgreSQL, without a database.
    pub postgres: String,
    /// An administrator's URL of RabbitMQ, without a virtual host.
    pub amqp: String,
    /// The management API's URL, with the administrator's name and password.
    pub management: String,
}

impl Place {
    /// The servers that `devstack run` started around the tests.
    ///
    /// # Panics
    /// When they are not there, with the command that starts them.
    pub fn around() -> Self {
        let server = |name: &str| {
            std::env::var(name).unwrap_or_else(|_| {
                panic!(
                    "{name} is not set: run `make test`, or `cargo run -p devstack -- run -- cargo test -p …`"
                )
            })
        };
        Self { postgres: server(POSTGRES_URL), amqp: server(AMQP_URL), management: server(MANAGEMENT_URL) }
    }

    /// A test's own servers.
    pub fn of(servers: &Servers) -> Self {
        Self {
            postgres: servers.postgres.url(),
            amqp: servers.rabbitmq.url(),
            management: servers.rabbitmq.management_url(),
        }
    }

    /// Creates an empty database and returns a superuser's URL of it.
    pub async fn database(&self, name: &str) -> String {
        let server = &self.postgres;
        let database = format!("{name}_{}", Uuid::new_v4().simple());
        let mut conn = PgConnection::connect(&format!("{server}/postgres"))
            .await
            .expect("the private PostgreSQL answers");
        sqlx::query(AssertSqlSafe(format!("CREATE DATABASE {database}")))
            .execute(&mut conn)
            .await
            .expect("a superuser may create databases");
        format!("{server}/{database}")
    }

    /// Creates an empty virtual host and returns an administrator's AMQP URL of it.
    pub async fn virtual_host(&self, name: &str) -> String {
        let vhost = format!("{name}_{}", Uuid::new_v4().simple());
        let url = format!("{}/api/vhosts/{vhost}", self.management);
        let answer = client().put(url).send().await.expect("the private RabbitMQ answers");
        assert!(answer.status().is_success(), "the virtual host was not created: {}", answer.status());
        format!("{}/{vhost}", self.amqp)
    }
}

impl Place {
    /// Makes a user of the virtual host that an administrator's URL names, with a name of its own, and returns its
    /// URL.
    pub async fn broker_user(&self, amqp: &str, program: &str, rights: users::Rights<'_>) -> String {
        let (_, address) = amqp.rsplit_once('@').expect("the URL has a host");
        let (_, vhost) = address.rsplit_once('/').expect("the URL has a virtual host");
        let user = format!("{vhost}_{program}");
        users::make(&self.management, vhost, (&user, Roles::PASSWORD), rights)
            .await
            .expect("an administrator may make users");
        format!("amqp://{user}:{}@{address}", Roles::PASSWORD)
    }
}

/// The roles of a test's database, of their own names.
#[derive(Clone, Debug)]
pub struct Roles {
    /// The superuser's URL.
    admin: String,
}

impl Roles {
    /// Their password.
    pub const PASSWORD: &str = "test";

    /// Makes the roles of this database, whose schemas are there; again grants what is new.
    pub async fn make(admin_url: &str) -> Self {
        let roles = Self::of(admin_url);
        let names = crate::roles::PROGRAMS.map(|program| (program, roles.name(program)));
        let names = names.each_ref().map(|(program, role)| (*program, role.as_str()));
        let mut conn = PgConnection::connect(admin_url).await.expect("the database answers");
        crate::roles::make(&mut conn, &names, Self::PASSWORD).await.expect("a superuser may make roles");
        roles
    }

    /// What they are called, whether or not they are there.
    pub fn of(admin_url: &str) -> Self {
        Self { admin: admin_url.to_owned() }
    }

    /// The role of a program: its name and the database's number.
    pub fn name(&self, program: &str) -> String {
        let number = self.admin.rsplit(['_', '/']).next().unwrap_or_default();
        format!("{program}_{number}")
    }

    /// The database's URL as a program connects.
    pub fn url(&self, program: &str) -> String {
        let (_, place) = self.admin.rsplit_once('@').expect("the URL has a host");
        format!("postgres://{}:{}@{place}", self.name(program), Self::PASSWORD)
    }
}

/// An empty database on the servers around the tests.
pub async fn database(name: &str) -> String {
    Place::around().database(name).await
}

/// An empty virtual host on the servers around the tests.
pub async fn virtual_host(name: &str) -> String {
    Place::around().virtual_host(name).await
}

/// The tables of a database in which `text` stands in some row: as text, or in bytes. For tests of erasure.
pub async fn tables_with(url: &str, text: &str) -> Vec<String> {
    let mut conn = PgConnection::connect(url).await.expect("the database answers");
    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind = 'r' AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema' ORDER BY 1",
    )
    .fetch_all(&mut conn)
    .await
    .expect("a superuser reads the catalog");
    let mut found = Vec::new();
    for table in tables {
        let sql = format!(
            "SELECT EXISTS (SELECT FROM {table} AS t
                            WHERE strpos(t::text, $1) > 0
                               OR strpos(t::text, encode(convert_to($1, 'UTF8'), 'hex')) > 0)"
        );
        let stands: bool = sqlx::query_scalar(AssertSqlSafe(sql))
            .bind(text)
            .fetch_one(&mut conn)
            .await
            .expect("a superuser reads every table");
        if stands {
            found.push(table);
        }
    }
    found
}
