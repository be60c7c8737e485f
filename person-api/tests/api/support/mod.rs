//! A database, the app on it, and what a test says to it and reads from it.

mod http;
mod process;
mod proxy;
mod redact;

use std::time::Duration;

use daemon::{config::database, health::Health};
use devstack::testing::{Document, Roles};
use outbox::Waker;
use person_api::{
    api::Api,
    schema,
    store::{Connections, Store},
};
use poem::{Endpoint, EndpointExt, Request, Response};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};
use tokio::sync::OnceCell;
use web::front::Keys;

pub(crate) use devstack::testing::until;
pub(crate) use http::{exchange, plain, post, raw_request, with};
pub(crate) use process::{Program, answer, command, finished, post_request};
pub(crate) use proxy::Proxy;
pub(crate) use redact::Redactions;

/// A database with both schemas and the programs' roles.
pub(crate) struct Database {
    /// As a superuser.
    pub(crate) admin: PgPool,
    pub(crate) admin_url: String,
    pub(crate) roles: Roles,
}

impl Database {
    pub(crate) async fn new() -> Self {
        let admin_url = devstack::testing::database("person_api").await;
        let admin = admin_url.parse::<database::Database>().unwrap().pool(4);
        let mut conn = admin.acquire().await.unwrap();
        schema::migrator().run(&mut *conn).await.unwrap();
        outbox::install(&mut conn, "person").await.unwrap();
        drop(conn);
        let roles = Roles::make(&admin_url).await;
        Self { admin, admin_url, roles }
    }

    /// The URL of the role that the API runs as, on another port if a proxy is between.
    pub(crate) fn url(&self, port: Option<u16>) -> String {
        let url = self.roles.url("person_api");
        match port {
            Some(port) => url.replace(&self.server(), &format!("127.0.0.1:{port}")),
            None => url,
        }
    }

    /// Where the server listens.
    pub(crate) fn server(&self) -> String {
        self.admin_url.rsplit_once('@').unwrap().1.split_once('/').unwrap().0.to_owned()
    }

    /// The app as the role that it runs as.
    pub(crate) fn app(&self) -> App {
        App::new(&self.api(Duration::from_secs(30), Waker::new()))
    }

    /// What is behind the app.
    pub(crate) fn api(&self, statement_timeout: Duration, waker: Waker) -> Api {
        let database: database::Database = self.url(None).parse().unwrap();
        let timeout = statement_timeout.as_millis().to_string();
        let connections = Connections::new(database.with("statement_timeout", timeout), 8);
        Api::new(Store::new(connections), waker)
    }

    /// Every event, as the relay will forward it: version, type, headers and body.
    pub(crate) async fn events(&self) -> String {
        let sql = "SELECT concat_ws(' ', version, type, headers::text, payload::text) FROM outbox.event
                   ORDER BY position";
        sqlx::query_scalar::<_, String>(sql).fetch_all(&self.admin).await.unwrap().join("\n") + "\n"
    }

    /// Every row that a write could leave, one a line.
    pub(crate) async fn rows(&self) -> String {
        let mut rows = String::new();
        for (table, order) in [
            ("person.person", "created_at, id"),
            ("person.income", "id"),
            ("person.asset", "id"),
            ("person.debt", "id"),
            ("person.idempotency", "created_at, key"),
            ("outbox.event", "position"),
        ] {
            let sql = format!("SELECT row_to_json(t)::text FROM {table} t ORDER BY {order}");
            for row in
                sqlx::query_scalar::<_, String>(AssertSqlSafe(sql)).fetch_all(&self.admin).await.unwrap()
            {
                rows += &format!("{table} {row}\n");
            }
        }
        rows
    }

    /// Waits until so many statements of this database wait for a lock.
    pub(crate) async fn until_blocked(&self, statements: i64) {
        let blocked = "SELECT count(*) FROM pg_stat_activity
                       WHERE datname = current_database() AND wait_event_type = 'Lock'";
        until("statements wait for a lock", async || {
            sqlx::query_scalar::<_, i64>(blocked).fetch_one(&self.admin).await.unwrap() == statements
        })
        .await;
    }
}

/// An empty database, as a superuser.
pub(crate) async fn empty_database() -> (String, PgConnection) {
    let url = devstack::testing::database("person_api").await;
    let conn = PgConnection::connect(&url).await.unwrap();
    (url, conn)
}

/// The whole app without a socket.
pub(crate) struct App {
    endpoint: poem::endpoint::BoxEndpoint<'static, Response>,
    document: OnceCell<Document>,
}

impl App {
    pub(crate) fn new(api: &Api) -> Self {
        let endpoint =
            web::front::guarded(web::health::add_to(api.routes(), &Health::new(), None), Keys::default())
                .boxed();
        Self { endpoint, document: OnceCell::new() }
    }

    /// Sends a request, and holds the answer against the documentation.
    pub(crate) async fn call(&self, request: Request) -> Response {
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let mut response = self.endpoint.call(request).await.unwrap();
        let body = response.take_body().into_vec().await.unwrap();
        let document = self
            .document
            .get_or_init(async || {
                let request = Request::builder().uri("/openapi.json".parse().unwrap()).finish();
                let document = self.endpoint.call(request).await.unwrap();
                Document::new(&document.into_body().into_vec().await.unwrap())
            })
            .await;
        document.check(&method, &path, response.status(), response.headers(), &body);
        response.set_body(body);
        response
    }

    /// Posts JSON, expects 201. Returns where it is, and the token of the state.
    pub(crate) async fn create(&self, path: &str, body: &str) -> (String, String) {
        let response = self.call(post(path, body)).await;
        assert_eq!(response.status().as_u16(), 201, "{path} {body}");
        let header = |name| response.headers()[name].to_str().unwrap().to_owned();
        (header("location"), header("etag"))
    }
}
