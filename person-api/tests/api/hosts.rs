//! Without keys a web page could reach the program under a name of its own (DNS rebinding): it serves this machine's
//! names alone.

use crate::{
    outage::PERSON,
    support::{Database, Program, answer},
};

async fn status(program: &Program, method: &str, target: &str, host: &str, more: &str) -> u16 {
    let length = if method == "POST" { PERSON.len() } else { 0 };
    let body = if method == "POST" { PERSON } else { "" };
    let request = format!(
        "{method} {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n{more}\r\n{body}"
    );
    let answer = answer(program.send(&request).await).await;
    answer.split(' ').nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn without_keys_a_foreign_host_reads_and_changes_nothing() {
    let database = Database::new().await;
    let program = Program::start(&database.url(None)).await;
    let (before, port) = (database.rows().await, program.address.port());
    for host in [
        "evil.example",
        "evil.example:80",
        "localhost.evil.example",
        "person",
        "10.0.0.1",
        "127.0.0.1.nip.io",
    ] {
        for (method, path) in [
            ("POST", "/person"),
            ("GET", "/person/11111"),
            ("HEAD", "/person/11111"),
            ("DELETE", "/person/11111"),
            ("GET", "/ready"),
            ("GET", "/live"),
            ("GET", "/metrics"),
            ("GET", "/docs"),
            ("GET", "/nowhere"),
        ] {
            assert_eq!(status(&program, method, path, host, "").await, 421, "{method} {path} for {host}");
        }
    }
    let target = "http://evil.example/person/11111";
    assert_eq!(status(&program, "GET", target, "localhost", "").await, 421, "the request line counts");
    assert_eq!(
        status(&program, "GET", "/live", "evil.example@localhost", "").await,
        400,
        "no user has a place there"
    );
    assert_eq!(database.rows().await, before, "something was written");
    insta::assert_snapshot!(
        answer(
            program
                .send("GET /person/11111 HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n")
                .await
        )
        .await
    );
    let hosts = [
        "localhost",
        &format!("LOCALHOST:{port}"),
        "person.localhost",
        "127.0.0.1",
        "[::1]:8000",
        "localhost.",
    ];
    for host in hosts {
        assert_eq!(status(&program, "GET", "/person/11111", host, "").await, 404, "{host}");
    }
}

#[tokio::test]
async fn hosts_can_be_allowed_and_a_key_is_enough() {
    let database = Database::new().await;
    let settings = ["--allowed-hosts", "person.example,10.1.2.3"];
    let program = Program::start_with(&database.url(None), &settings).await;
    for (host, expected) in
        [("person.example", 404), ("PERSON.example.:80", 404), ("10.1.2.3:8000", 404), ("evil.example", 421)]
    {
        assert_eq!(status(&program, "GET", "/person/11111", host, "").await, expected, "{host}");
    }

    let keys = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("hosts-keys");
    std::fs::write(&keys, "shop:0123456789abcdef\n").unwrap();
    let program =
        Program::start_with(&database.url(None), &["--api-keys-file", keys.to_str().unwrap()]).await;
    let key = "authorization: Bearer 0123456789abcdef\r\n";
    assert_eq!(status(&program, "GET", "/person/11111", "anything.example", key).await, 404);
    assert_eq!(status(&program, "GET", "/person/11111", "anything.example", "").await, 401);
}
