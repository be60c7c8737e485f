//! The console in a real browser: Debian's chromium, by its chromedriver (`crates/devstack/install tests`).

use std::{process::Stdio, sync::Arc};

use devstack::{folder::Folder, ports, testing::eventually};
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    task::{AbortHandle, JoinSet},
};

use crate::desk::{ACTOR, Console, LOOKER, READER, Shop};

/// What chromedriver calls an element (W3C `WebDriver`, 11).
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

/// A chromedriver. It ends when it is dropped.
struct Driver {
    _child: Child,
    /// What the browser leaves behind is removed with it.
    _folder: Folder,
    url: String,
}

/// A window of its own, with its own cookies.
struct Browser {
    http: reqwest::Client,
    session: String,
}

impl Driver {
    async fn start() -> Self {
        let (port, folder) = (ports::free(), Folder::temporary().unwrap());
        let child = Command::new("chromedriver")
            .env("TMPDIR", folder.path())
            .arg(format!("--port={port}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| {
                panic!("chromedriver: {error}; crates/devstack/install tests installs it")
            });
        let url = format!("http://127.0.0.1:{port}");
        eventually("chromedriver is ready", async || {
            let status = client().get(format!("{url}/status")).send().await;
            status.map(drop).map_err(|error| error.to_string())
        })
        .await;
        Self { _child: child, _folder: folder, url }
    }

    async fn browser(&self) -> Browser {
        let arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-proxy-server",
        ];
        let options = json!({"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": {"args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }}});
        let http = client();
        let response = http.post(format!("{}/session", self.url)).json(&options).send().await.unwrap();
        let body: Value = response.json().await.unwrap();
        let id = body["value"]["sessionId"].as_str().unwrap_or_else(|| panic!("{body}"));
        Browser { http, session: format!("{}/session/{id}", self.url) }
    }
}

fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().timeout(std::time::Duration::from_mins(1)).build().unwrap()
}

impl Browser {
    async fn ask(&self, path: &str, body: Value) -> Value {
        let response = self.http.post(format!("{}/{path}", self.session)).json(&body).send().await.unwrap();
        let body: Value = response.json().await.unwrap();
        assert!(body["value"]["error"].is_null(), "{path}: {body}");
        body["value"].clone()
    }

    async fn open(&self, url: &str) {
        self.ask("url", json!({"url": url})).await;
    }

    async fn script(&self, script: &str) -> Value {
        self.ask("execute/sync", json!({"script": script, "args": []})).await
    }

    async fn element(&self, css: &str) -> String {
        let found = self.ask("element", json!({"using": "css selector", "value": css})).await;
        found[ELEMENT].as_str().unwrap().to_owned()
    }

    async fn click(&self, css: &str) {
        let element = self.element(css).await;
        self.ask(&format!("element/{element}/click"), json!({})).await;
    }

    async fn write(&self, css: &str, text: &str) {
        let element = self.element(css).await;
        self.ask(&format!("element/{element}/value"), json!({"text": text})).await;
    }

    /// What is to be read.
    async fn text(&self) -> String {
        self.script("return document.body.innerText").await.as_str().unwrap().to_owned()
    }

    async fn reads(&self, awaited: &str) -> String {
        eventually(awaited, async || {
            let text = self.text().await;
            if text.contains(awaited) { Ok(text) } else { Err(text) }
        })
        .await
    }

    async fn log_in(&self, console: &Console, path: &str, key: &str) {
        self.open(&console.url(path)).await;
        self.write("input[name=key]", key).await;
        self.click("main button").await;
        self.reads("Log out").await;
    }

    /// That nothing foreign ran, and nothing was refused by the policy.
    async fn is_clean(&self) {
        assert_eq!(self.script("return window.hit === undefined").await, true);
        let log = self.ask("se/log", json!({"type": "browser"})).await;
        let log = log.to_string();
        assert!(!log.contains("Content Security Policy") && !log.contains("Uncaught"), "{log}");
    }

    async fn end(self) {
        let _ = self.http.delete(&self.session).send().await;
    }
}

/// A wire to the database, to be cut.
struct Wire {
    address: String,
    accepting: AbortHandle,
}

impl Wire {
    async fn to(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        // The connections end with the task that has them.
        let task = tokio::spawn(async move {
            let mut wires = JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                let target = target.clone();
                wires.spawn(async move {
                    let mut far = TcpStream::connect(target).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                });
            }
        });
        Self { address, accepting: task.abort_handle() }
    }

    fn cut(&self) {
        self.accepting.abort();
    }
}

const HOSTILE: &str = "<img src=x onerror=\"window.hit=1\"><script>window.hit=2</script>'\"\u{202e}";

async fn console(shop: &Shop, url: &str) -> Console {
    shop.let_operate().await;
    Console::start("[outbox.shop]\n", &[("OUTBOX_SHOP_DATABASE_URL", url)]).await
}

#[tokio::test]
async fn no_script_of_an_event_runs() {
    let shop = Shop::new("console_browser_hostile").await;
    let _leader = shop.lead().await;
    sqlx::query("SELECT outbox.publish($1, 'thing', $2, json_build_object('name', $2))")
        .bind("thing.new")
        .bind(HOSTILE)
        .execute(&shop.admin)
        .await
        .unwrap();
    shop.settle().await;
    sqlx::query(
        "INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, payload,
                                    headers, created_at, reason, detail)
         SELECT 'default', position, id, aggregate_type, aggregate_id, version, type, payload, headers, created_at,
                'refused', $1 FROM outbox.event",
    )
    .bind(HOSTILE)
    .execute(&shop.admin)
    .await
    .unwrap();
    sqlx::query("UPDATE outbox.relay SET paused_at = now(), paused_by = $1")
        .bind(HOSTILE)
        .execute(&shop.admin)
        .await
        .unwrap();
    let console = console(&shop, &shop.reader_url).await;
    let (driver, id) =
        (Driver::start().await, sqlx::query_scalar::<_, uuid::Uuid>("SELECT id FROM outbox.event"));
    let id = id.fetch_one(&shop.admin).await.unwrap();
    let browser = driver.browser().await;
    browser.log_in(&console, "/outbox/shop", READER).await;
    browser.reads("is paused").await;
    browser.is_clean().await;
    let searched: String =
        url::form_urlencoded::byte_serialize(format!("thing/{HOSTILE}").as_bytes()).collect();
    for path in
        ["/", "/outbox/shop/parked", &format!("/find?q={id}"), &format!("/find?q={searched}"), "/audit"]
    {
        browser.open(&console.url(path)).await;
        browser.is_clean().await;
    }
    browser.open(&console.url(&format!("/find?q={id}"))).await;
    browser.write("main input[name=why]", HOSTILE).await;
    browser.click("main form button").await;
    assert!(browser.reads("This reading is in the audit").await.contains("window.hit=2"));
    browser.is_clean().await;
    browser.end().await;
}

#[tokio::test]
async fn an_open_page_follows_what_happens_and_says_when_the_database_goes_away() {
    let shop = Shop::new("console_browser_away").await;
    let _leader = shop.lead().await;
    let (before, rest) = shop.reader_url.rsplit_once('@').unwrap();
    let (address, database) = rest.split_once('/').unwrap();
    let wire = Wire::to(address.to_owned()).await;
    let console = console(&shop, &format!("{before}@{}/{database}", wire.address)).await;
    let driver = Driver::start().await;
    let browser = driver.browser().await;
    browser.log_in(&console, "/outbox/shop", LOOKER).await;
    browser.reads("Everything flows").await;
    // The page is not loaded again: its script takes over what has changed.
    browser.script("window.same = true").await;
    shop.run("UPDATE outbox.relay SET paused_at = now(), paused_by = 'ann'").await;
    browser.reads("is paused since").await;
    wire.cut();
    let text = browser.reads("The console cannot look at this database").await;
    assert!(text.contains("What follows was seen at"), "{text}");
    assert_eq!(browser.script("return window.same").await, true);
    browser.is_clean().await;
    // The first stop of the keyboard leads to the main part, and every field has a name.
    browser.open(&console.url("/outbox/shop")).await;
    let unnamed = "return [...document.querySelectorAll('input:not([type=hidden]), select')].filter(i => !i.labels.length).length";
    assert_eq!(browser.script(unnamed).await, 0);
    let first = "return document.querySelector('a, button, input').textContent";
    assert_eq!(browser.script(first).await, "To the main part");
    // Nothing is wider than a telephone.
    browser.ask("window/rect", json!({"width": 500, "height": 900})).await;
    let fits = "return document.documentElement.scrollWidth <= window.innerWidth";
    assert_eq!(browser.script(fits).await, true);
    browser.end().await;
}

#[tokio::test]
async fn two_operators_see_what_the_other_does() {
    let shop = Arc::new(Shop::new("console_browser_two").await);
    let _leader = shop.lead().await;
    let console = console(&shop, &shop.reader_url).await;
    let driver = Driver::start().await;
    let (ann, bob) = (driver.browser().await, driver.browser().await);
    ann.log_in(&console, "/outbox/shop", ACTOR).await;
    bob.log_in(&console, "/outbox/shop", READER).await;
    ann.write("form[action='/outbox/shop/pause'] input[name=why]", "the queue is moved").await;
    ann.click("form[action='/outbox/shop/pause'] button").await;
    ann.reads("by actor (the queue is moved)").await;
    bob.reads("by actor (the queue is moved)").await;
    bob.write("form[action='/outbox/shop/resume'] input[name=why]", "it is moved").await;
    bob.click("form[action='/outbox/shop/resume'] button").await;
    bob.reads("Everything flows").await;
    ann.reads("Everything flows").await;
    ann.open(&console.url("/audit")).await;
    let text = ann.reads("the queue is moved").await;
    assert!(text.contains("it is moved") && text.contains("reader"), "{text}");
    ann.is_clean().await;
    ann.click("form[action='/logout'] button").await;
    ann.reads("Log in").await;
    ann.end().await;
    bob.end().await;
}
