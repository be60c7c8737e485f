//! A person service whose URL leads to a standby: it reads, takes no write, and says so; when the standby is promoted,
//! it goes on without a restart.

use std::time::{Duration, Instant};

use devstack::{folder::Folder, ports, postgres::Postgres, program::Program, roles};
use reqwest::{Client, Method, Response};
use sqlx::{Connection, Executor, PgConnection};
use tokio_util::sync::CancellationToken;

/// How long anything may take on a busy machine.
const DEADLINE: Duration = Duration::from_mins(1);
const PERSON: &str = r#"{"cpf": 22222, "name": "abc", "date_of_birth": "2019-06-15"}"#;
const ITEM: &str = r#"{"type": "renting", "value": 1000}"#;
const DEBT: &str = r#"{"value": 1}"#;

/// The primary with its schemas and roles, and a service that is not started.
async fn primary(folder: &Folder) -> (Postgres, Program) {
    let mut primary = Postgres::new(folder, ports::free(), false).await.unwrap();
    primary.start().await.unwrap();
    let mut conn = PgConnection::connect(&format!("{}/postgres", primary.url())).await.unwrap();
    conn.execute("CREATE DATABASE person").await.unwrap();
    let url = format!("{}/person", primary.url());
    let program = |name| Program::new(folder, name, name, ports::free()).unwrap();
    let api = program("person-api");
    let database = [("DATABASE_URL", &*url)];
    api.command(&["migrate"], &database).await.unwrap();
    program("outbox-relay").command(&["migrate", "--source", "person"], &database).await.unwrap();
    let mut conn = PgConnection::connect(&url).await.unwrap();
    let (login, _) = url.rsplit_once('@').unwrap();
    let (_, password) = login.rsplit_once(':').unwrap();
    roles::make(&mut conn, &[], password).await.unwrap();
    (primary, api)
}

/// A request of each kind that writes, and its answer once writes are taken. Each is one event.
const WRITES: [(Method, &str, &str, u16); 8] = [
    (Method::POST, "/person", PERSON, 201),
    (Method::POST, "/person/11111/income", ITEM, 201),
    (Method::POST, "/person/11111/asset", ITEM, 201),
    (Method::POST, "/person/11111/debt", DEBT, 201),
    (Method::PUT, "/person/11111/debt/ID", r#"{"value": 2}"#, 200),
    (Method::DELETE, "/person/11111/debt/ID", "", 200),
    (Method::PATCH, "/person/11111", r#"{"name": "def"}"#, 200),
    (Method::DELETE, "/person/22222", "", 200),
];

/// The service over HTTP.
struct Api {
    client: Client,
    url: String,
}

impl Api {
    async fn send(&self, method: Method, path: &str, body: &str) -> Response {
        let mut request = self.client.request(method.clone(), format!("{}{path}", self.url));
        if !body.is_empty() {
            request = request.header("Content-Type", "application/json").body(body.to_owned());
        }
        if method == Method::POST {
            // The same key, before and after: what was not stored is no earlier request.
            request = request.header("Idempotency-Key", path.replace('/', "-"));
        }
        request.send().await.unwrap()
    }

    async fn created(&self, path: &str, body: &str) -> String {
        let answer = self.client.post(format!("{}{path}", self.url));
        let answer = answer.header("Content-Type", "application/json").body(body.to_owned());
        let answer = answer.send().await.unwrap();
        assert_eq!(answer.status(), 201);
        let answer: serde_json::Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
        answer["id"].as_str().unwrap().to_owned()
    }
}

/// Every row of the service's, and of the outbox.
async fn rows(url: &str) -> Vec<String> {
    let mut conn = PgConnection::connect(url).await.unwrap();
    let sql = "SELECT to_json(p)::text FROM person.person p UNION ALL SELECT to_json(i)::text FROM person.income i
               UNION ALL SELECT to_json(a)::text FROM person.asset a UNION ALL SELECT to_json(d)::text FROM person.debt d
               UNION ALL SELECT to_json(k)::text FROM person.idempotency k
               UNION ALL SELECT to_json(e)::text FROM outbox.event e ORDER BY 1";
    sqlx::query_scalar(sql).fetch_all(&mut conn).await.unwrap()
}

/// Waits until the service is not ready for a reason that contains `reason`.
async fn says(program: &Program, reason: &str) {
    let end = Instant::now() + DEADLINE;
    loop {
        let said = program.not_ready().await.unwrap_or_else(|| "it is ready".to_owned());
        if said.contains(reason) {
            return;
        }
        assert!(Instant::now() < end, "in vain: {reason}; last: {said}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: make test-faults"]
async fn on_a_standby_nothing_is_written_and_once_it_is_promoted_everything_is() {
    let folder = Folder::temporary().unwrap();
    let (mut primary, api) = primary(&folder).await;
    let mut standby = primary.standby(&folder, ports::free()).await.unwrap();
    standby.start().await.unwrap();
    let database = |server: &Postgres| format!("{}/person", server.url_of("person_api"));

    // The primary's service has written something, which the standby has too.
    let mut api = api.env("DATABASE_URL", &database(&primary));
    api.start().await.unwrap();
    api.ready(DEADLINE).await.unwrap();
    let client = Client::builder().no_proxy().timeout(Duration::from_secs(20)).build().unwrap();
    let http = Api { client: client.clone(), url: api.url() };
    http.created("/person", &PERSON.replace("22222", "11111")).await;
    let debt = http.created("/person/11111/debt", DEBT).await;
    api.stop(&CancellationToken::new()).await;
    let before = rows(&format!("{}/person", primary.url())).await;
    let copy = format!("{}/person", standby.url());
    let end = Instant::now() + DEADLINE;
    while rows(&copy).await != before {
        assert!(Instant::now() < end, "the standby does not follow");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    // Led to the standby: it reads, takes no write, and says so.
    api.set_env("DATABASE_URL", &database(&standby));
    api.start().await.unwrap();
    says(&api, "the server is in recovery").await;
    let ready = client.get(format!("{}/ready", http.url)).send().await.unwrap();
    assert_eq!(ready.status(), 503);
    let writes = || {
        WRITES
            .into_iter()
            .map(|(method, path, body, status)| (method, path.replace("ID", &debt), body, status))
    };
    for (method, path, body, _) in writes() {
        let answer = http.send(method.clone(), &path, body).await;
        let what = format!("{method} {path}");
        assert_eq!(answer.status(), 503, "{what}");
        assert!(answer.headers().contains_key("retry-after"), "{what}");
        let said = answer.text().await.unwrap();
        assert!(said.contains("takes no writes right now. Nothing was stored."), "{what}: {said}");
    }
    let read = client.get(format!("{}/person/11111", http.url)).send().await.unwrap();
    assert_eq!(read.status(), 200, "reading goes on");
    says(&api, "the server is in recovery").await;
    assert_eq!(rows(&copy).await, before, "something was written on the standby");
    assert_eq!(
        rows(&format!("{}/person", primary.url())).await,
        before,
        "something was written on the primary"
    );

    // The primary is lost, and the standby takes its place, under the same process of the service.
    primary.stop(&CancellationToken::new()).await;
    let mut conn = PgConnection::connect(&copy).await.unwrap();
    conn.execute("SELECT pg_promote()").await.unwrap();
    api.ready(DEADLINE).await.unwrap();
    for (method, path, body, status) in writes() {
        let answer = http.send(method.clone(), &path, body).await;
        let (got, what) = (answer.status(), format!("{method} {path}"));
        let said = answer.text().await.unwrap();
        assert_eq!(got, status, "{what}: {said}");
    }
    // One event for each write, two of them from before, in chains without a hole.
    let (events, chained): (i64, bool) = sqlx::query_as(
        "SELECT sum(events)::bigint, bool_and(events = last AND first = 1)
         FROM (SELECT count(*) AS events, max(version) AS last, min(version) AS first
               FROM outbox.event GROUP BY aggregate_type, aggregate_id) AS chain",
    )
    .fetch_one(&mut conn)
    .await
    .unwrap();
    assert_eq!((events, chained), (10, true));
    // What it does beside requests goes on, too: old answers and the relay's notices.
    api.ready(DEADLINE).await.unwrap();
    api.stop(&CancellationToken::new()).await;
    conn.close().await.unwrap();
    standby.stop(&CancellationToken::new()).await;
}
