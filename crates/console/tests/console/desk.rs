//! A console, the databases that it looks at, and an operator who reads pages.

use std::{fmt::Write as _, path::PathBuf, process::Stdio};

use devstack::{
    ports,
    testing::{self, eventually},
};
use reqwest::{Response, StatusCode, header};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, PgPool};
use tokio::process::{Child, Command};
use uuid::Uuid;

/// The secrets of the keys `looker`, `actor` and `reader`, and of one without a role.
pub(crate) const LOOKER: &str = "looker-0123456789";
pub(crate) const ACTOR: &str = "actor-0123456789";
pub(crate) const READER: &str = "reader-0123456789";
pub(crate) const NOBODY: &str = "nobody-0123456789";

const KEYS: &str =
    "looker:looker-0123456789\nactor:actor-0123456789\nreader:reader-0123456789\nnobody:nobody-0123456789\n";
const ROLES: &str = "[role]\nlooker = 'look'\nactor = 'act'\nreader = 'bodies'\n";
/// To be found on no page.
pub(crate) const PASSWORD: &str = "dbs3cretdbs3cret";

/// A database with an outbox of the source `shop`, and roles of its own.
pub(crate) struct Shop {
    /// A superuser's connections.
    pub(crate) admin: PgPool,
    /// The URL of a role that may look and no more.
    pub(crate) reader_url: String,
    /// The URL of the relay's role.
    pub(crate) relay_url: String,
    /// A superuser's URL.
    pub(crate) admin_url: String,
}

impl Shop {
    pub(crate) async fn new(name: &str) -> Self {
        let url = testing::database(name).await;
        let host = url.rsplit_once('@').unwrap().1.to_owned();
        let database = url.rsplit_once('/').unwrap().1.to_owned();
        let admin = PgPool::connect(&url).await.unwrap();
        let mut conn = admin.acquire().await.unwrap();
        outbox::install(&mut conn, "shop").await.unwrap();
        let (reader, relay) = (format!("{database}_reader"), format!("{database}_relay"));
        let names = [("reader", &*reader), ("outbox_relay", &*relay)];
        devstack::roles::make(&mut conn, &names, PASSWORD).await.unwrap();
        for sql in [
            format!("ALTER ROLE {reader} PASSWORD '{PASSWORD}'"),
            format!("GRANT pg_read_all_stats TO {reader}"),
        ] {
            conn.execute(AssertSqlSafe(sql)).await.unwrap();
        }
        drop(conn);
        Self {
            admin,
            reader_url: format!("postgres://{reader}:{PASSWORD}@{host}"),
            relay_url: format!("postgres://{relay}:{PASSWORD}@{host}"),
            admin_url: url,
        }
    }

    /// The schema of inboxes, in the same database.
    pub(crate) async fn with_inbox(&self) {
        inbox::migrator().run(&mut *self.admin.acquire().await.unwrap()).await.unwrap();
    }

    /// The console's role may act, and read bodies.
    pub(crate) async fn let_operate(&self) {
        let (role, _) = self.reader_url.trim_start_matches("postgres://").split_once(':').unwrap();
        self.run(&format!("SELECT outbox.grant_operator('{role}'), outbox.grant_bodies('{role}')")).await;
        let has_inbox = sqlx::query_scalar("SELECT to_regnamespace('inbox') IS NOT NULL");
        if has_inbox.fetch_one(&self.admin).await.unwrap() {
            self.run(&format!("SELECT inbox.grant_operator('{role}')")).await;
        }
    }

    pub(crate) async fn run(&self, sql: &str) {
        self.admin.execute(AssertSqlSafe(sql.to_owned())).await.unwrap();
    }

    /// Appends so many events of a type, of an aggregate each.
    pub(crate) async fn append(&self, type_: &str, count: i64) {
        let sql = "SELECT outbox.publish($1, 'thing', gen_random_uuid()::text, json_build_object('n', n)) FROM generate_series(1, $2) n";
        sqlx::query(sql).bind(type_).bind(count).execute(&self.admin).await.unwrap();
    }

    /// A session that leads the relay `default`, as far as the database can tell. Ends when it is dropped.
    pub(crate) async fn lead(&self) -> PgConnection {
        let mut conn = PgConnection::connect(&self.relay_url).await.unwrap();
        self.run(
            "INSERT INTO outbox.relay (name, leader, leader_since, heartbeat_at)
             VALUES ('default', 'host:7', now(), now() + interval '1 hour') ON CONFLICT DO NOTHING",
        )
        .await;
        let leads: bool =
            sqlx::query_scalar("SELECT outbox.try_lead(id) FROM outbox.relay WHERE name = 'default'")
                .fetch_one(&mut conn)
                .await
                .unwrap();
        assert!(leads);
        conn
    }

    /// As a relay that has settled everything.
    pub(crate) async fn settle(&self) {
        self.run(
            "UPDATE outbox.relay SET low_water = mark, high = mark, open = '{}'
             FROM (SELECT max(position) AS mark FROM outbox.event) AS e",
        )
        .await;
    }
}

/// A running console. It ends when it is dropped.
pub(crate) struct Console {
    _child: Child,
    pub(crate) address: String,
    folder: PathBuf,
    pub(crate) http: reqwest::Client,
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Console {
    /// With these tables, and variables with the URLs of their databases.
    pub(crate) async fn start(tables: &str, variables: &[(&str, &str)]) -> Self {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("console-{}", Uuid::new_v4()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("keys"), KEYS).unwrap();
        std::fs::write(folder.join("console.toml"), format!("{ROLES}{tables}")).unwrap();
        let http = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(std::time::Duration::from_secs(20))
            .build()
            .unwrap();
        loop {
            let address = format!("127.0.0.1:{}", ports::free());
            let log = std::fs::File::create(folder.join("log")).unwrap();
            let mut child = Command::new(env!("CARGO_BIN_EXE_outbox-console"))
                .arg("run")
                .env_clear()
                .env("CONFIG_FILE", folder.join("console.toml"))
                .env("API_KEYS_FILE", folder.join("keys"))
                .env("LISTEN", &address)
                .envs(variables.iter().copied())
                .stdin(Stdio::null())
                .stderr(log)
                .kill_on_drop(true)
                .spawn()
                .unwrap();
            let lives = eventually("the console lives", async || {
                if let Some(ended) = child.try_wait().unwrap() {
                    return Ok(Err(ended));
                }
                let live = http.get(format!("http://{address}/live")).send().await;
                live.map(|_| Ok(())).map_err(|error| error.to_string())
            })
            .await;
            let said = std::fs::read_to_string(folder.join("log")).unwrap();
            match lives {
                Ok(()) => return Self { _child: child, address, folder, http },
                Err(ended) => assert!(said.contains("cannot listen on"), "{ended}: {said}"),
            }
        }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// A page as the key sees it.
    pub(crate) async fn get(&self, path: &str, key: &str) -> (StatusCode, String) {
        let response = self.http.get(self.url(path)).bearer_auth(key).send().await.unwrap();
        (response.status(), response.text().await.unwrap())
    }

    /// The text of a page.
    pub(crate) async fn read(&self, path: &str) -> String {
        let (status, html) = self.get(path, LOOKER).await;
        assert!(!html.contains(PASSWORD), "{html}");
        assert_eq!(status, StatusCode::OK, "{html}");
        text(&html)
    }

    /// Reads a page until it has this text.
    pub(crate) async fn reads(&self, path: &str, awaited: &str) -> String {
        eventually(awaited, async || {
            let page = self.read(path).await;
            if page.contains(awaited) { Ok(page) } else { Err(page) }
        })
        .await
    }

    /// Logs in; the cookie.
    pub(crate) async fn log_in(&self, key: &str) -> String {
        let response =
            self.http.post(self.url("/login")).body(format!("key={key}&to=%2F")).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::SEE_OTHER);
        cookie(&response)
    }

    /// Sends a form as a program.
    pub(crate) async fn post(&self, path: &str, key: &str, form: &str) -> (StatusCode, String) {
        let request = self.http.post(self.url(path)).bearer_auth(key).body(form.to_owned());
        let response = request.send().await.unwrap();
        (response.status(), response.text().await.unwrap())
    }
}

pub(crate) fn cookie(response: &Response) -> String {
    let set = response.headers()[header::SET_COOKIE].to_str().unwrap();
    set.split(';').next().unwrap().to_owned()
}

/// What a reader of a page reads: a line for each block, cells apart.
pub(crate) fn text(html: &str) -> String {
    let (_, main) = html.split_once("<main").unwrap();
    let mut text = String::new();
    let mut rest = main.split_once('>').unwrap().1;
    while let Some((before, after)) = rest.split_once('<') {
        text.push_str(before);
        let (tag, next) = after.split_once('>').unwrap();
        let name = tag.split([' ', '/']).find(|part| !part.is_empty()).unwrap_or_default();
        let closes = tag.starts_with('/');
        match name {
            "h1" | "h2" | "h3" if !closes => {
                let _ = write!(text, "\n{} ", "#".repeat(name[1..].parse().unwrap()));
            }
            "td" | "th" if !closes => text.push_str(" | "),
            "dt" | "li" | "figcaption" if !closes => text.push_str("\n- "),
            "dd" if !closes => text.push_str(": "),
            "p" | "tr" | "section" | "form" | "pre" | "label" => text.push('\n'),
            "button" if !closes => text.push_str(" ["),
            "button" => text.push(']'),
            _ => {}
        }
        rest = next;
    }
    let text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&amp;", "&");
    let lines = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
    lines.filter(|line| !line.is_empty() && line != "-").collect::<Vec<_>>().join("\n")
}

/// Asserts a snapshot in which times, ids and rates are the same on every run.
macro_rules! assert_read {
    ($said:expr, @$is:literal) => {{
        let said = $said;
        insta::with_settings!({filters => $crate::desk::FILTERS.to_vec()}, { insta::assert_snapshot!(said, @$is); });
    }};
}

pub(crate) const FILTERS: [(&str, &str); 9] = [
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)? UTC", "TIME"),
    (r"[0-9a-f]{8}-[0-9a-f]{4}-[47][0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}", "UUID"),
    (r"\b\d+(\.\d)? (s|min)\b", "SPAN"),
    (r"\b(pid|Session|session) \d+", "$1 PID"),
    (r"[\d.]+ (published|appended)/s", "N $1/s"),
    (r"postgres://[^ ]+:\d+/[^ .]+", "ADDRESS"),
    (r"127\.0\.0\.1:\d+", "HOST"),
    (r"[\d.]+ now, at most [\d.]+", "N now, at most N"),
    (r"SPAN now, at most SPAN", "SPAN now, at most SPAN"),
];
