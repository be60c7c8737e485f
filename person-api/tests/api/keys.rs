//! Bearer keys: who may come in, what is open to all, and what becomes of a file that changes.

use std::{os::unix::fs::PermissionsExt, path::PathBuf};

use crate::{
    outage::{DEBT, PERSON},
    support::{Database, Program, answer, command, finished, until},
};

const SHOP: &str = "the-shop's-own-secret";
const NEXT: &str = "the-shop's-next-secret";
const BANK: &str = "the-bank's-own-secret";

/// A file of keys, in a folder of its own.
struct File(PathBuf);

impl File {
    fn new(name: &str, text: &str) -> Self {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("keys-{name}"));
        std::fs::create_dir_all(&folder).unwrap();
        let file = Self(folder.join("api-keys"));
        std::fs::write(&file.0, text).unwrap();
        file
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }

    /// As systems do it that hand out secrets: another file takes its place.
    fn replace(&self, text: &str) {
        let next = self.0.with_extension("next");
        std::fs::write(&next, text).unwrap();
        std::fs::rename(&next, &self.0).unwrap();
    }
}

/// The answer to a request with these headers.
async fn ask(program: &Program, method: &str, path: &str, headers: &[&str], body: &str) -> String {
    let headers = [headers, &[""]].concat().join("\r\n");
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n{headers}\r\n{body}"
    );
    answer(program.send(&request).await).await
}

fn bearer(secret: &str) -> String {
    format!("authorization: Bearer {secret}")
}

async fn lets_in(program: &Program, secret: &str) -> bool {
    let answer = ask(program, "GET", "/person/11111", &[&bearer(secret)], "").await;
    match answer.split(' ').nth(1).unwrap() {
        "200" | "404" => true,
        "401" => false,
        _ => panic!("{answer}"),
    }
}

#[tokio::test]
async fn only_who_has_a_key_comes_in() {
    let digest = "a35ad0d3ea7d0ee42ee2b1d6a63cf6a9ca19a4b2d2a8d8f2f44c6a2b6a0e0c11";
    let file =
        File::new("only", &format!("# two of them\nshop:{SHOP}\nbank:{BANK}\nother:sha256:{digest}\n"));
    let database = Database::new().await;
    let program = Program::start_with(&database.url(None), &["--api-keys-file", file.path()]).await;
    let mut shown = String::new();
    let before = database.rows().await;
    let (shop, double) = (bearer(SHOP), format!("{}\r\n{}", bearer(SHOP), bearer(SHOP)));
    let longer = format!("{shop}x");
    for (name, headers) in [
        ("nothing", &[][..]),
        ("a wrong one", &["authorization: Bearer the-shop's-own-secreT"]),
        ("a longer one", &[longer.as_str()]),
        ("an empty one", &["authorization: Bearer "]),
        (
            "its digest",
            &["authorization: Bearer a35ad0d3ea7d0ee42ee2b1d6a63cf6a9ca19a4b2d2a8d8f2f44c6a2b6a0e0c11"],
        ),
        ("another scheme of as many letters", &["authorization: Digest the-shop's-own-secret"]),
        ("another scheme", &["authorization: Basic dGhlLXNob3AncyBvd24tc2VjcmV0"]),
        ("the right one, twice", &[double.as_str()]),
    ] {
        let answer = ask(&program, "POST", "/person", headers, PERSON).await;
        assert!(answer.starts_with("HTTP/1.1 401 "), "{name}: {answer}");
        let wrong = answer.contains("\nwww-authenticate: Bearer error=\"invalid_token\"\n");
        assert_eq!(wrong, !headers.is_empty(), "{name}: {answer}");
        shown = answer;
    }
    insta::assert_snapshot!(shown);
    assert_eq!(database.rows().await, before, "something was written");
    for path in ["/person/11111", "/metrics", "/nothing/here"] {
        assert!(program.get(path).await.starts_with("HTTP/1.1 401 "), "{path}");
    }
    for path in ["/live", "/docs", "/openapi.json"] {
        assert!(program.get(path).await.starts_with("HTTP/1.1 200 "), "{path}");
    }
    assert!(!program.get("/ready").await.starts_with("HTTP/1.1 401"));

    // Each caller's Idempotency-Keys are their own.
    let key = "idempotency-key: 1";
    let lower = shop.replace("Bearer", "bearer ");
    assert!(ask(&program, "POST", "/person", &[&lower], PERSON).await.starts_with("HTTP/1.1 201 "));
    let mut answers = Vec::new();
    for caller in [bearer(SHOP), bearer(BANK), bearer(SHOP)] {
        answers.push(ask(&program, "POST", "/person/11111/debt", &[&caller, key], DEBT).await);
    }
    assert!(answers.iter().all(|answer| answer.starts_with("HTTP/1.1 201 ")), "{answers:?}");
    assert_eq!(answers[0], answers[2]);
    assert_ne!(answers[0], answers[1]);

    let metrics = ask(&program, "GET", "/metrics", &[&shop], "").await;
    assert!(metrics.contains("\napi_keys 3\n") && metrics.contains("\napi_keys_stale 0\n"), "{metrics}");
    program.terminate();
    let (_, log) = program.ended().await;
    for caller in ["shop", "bank", "anonymous"] {
        assert!(log.contains(&format!("\"caller\":\"{caller}\"")), "{log}");
    }
    for secret in [SHOP, BANK, digest] {
        assert!(!log.contains(secret) && !metrics.contains(secret), "a secret is written down: {log}");
    }
}

#[tokio::test]
async fn the_file_is_read_again_when_it_changes() {
    let file = File::new("again", &format!("shop:{SHOP}\n"));
    let database = Database::new().await;
    let program = Program::start_with(&database.url(None), &["--api-keys-file", file.path()]).await;
    assert!(lets_in(&program, SHOP).await && !lets_in(&program, NEXT).await);

    file.replace(&format!("shop:{SHOP}\nshop:{NEXT}\n"));
    until("both keys are known", async || lets_in(&program, NEXT).await).await;
    assert!(lets_in(&program, SHOP).await);

    // A wrong one changes nothing, and somebody can see it.
    file.replace(&format!("shop:{NEXT}\nshop {BANK}\n"));
    let stale = async |is: u8| {
        let metrics = ask(&program, "GET", "/metrics", &[&bearer(NEXT)], "").await;
        metrics.contains(&format!("\napi_keys_stale {is}\n"))
    };
    until("it is seen that the file is wrong", async || stale(1).await).await;
    assert!(lets_in(&program, SHOP).await && lets_in(&program, NEXT).await && !lets_in(&program, BANK).await);
    std::fs::remove_file(file.path()).unwrap();

    // The old key is taken away, in place this time.
    std::fs::write(file.path(), format!("shop:{NEXT}\n")).unwrap();
    until("the old key is no more", async || !lets_in(&program, SHOP).await).await;
    assert!(lets_in(&program, NEXT).await && stale(0).await);

    program.terminate();
    let (_, log) = program.ended().await;
    assert!(log.contains("line 2: it should look like name:secret"), "{log}");
    for secret in [SHOP, NEXT, BANK] {
        assert!(!log.contains(secret), "a secret is written down: {log}");
    }
}

#[tokio::test]
async fn it_does_not_start_where_the_keys_are_wrong_or_missing() {
    let wrong = File::new("wrong", &format!("shop:{SHOP}\nbank:short\n"));
    let right = File::new("right", &format!("shop:{SHOP}\n"));
    let open = File::new("open", &format!("shop:{SHOP}\n"));
    std::fs::set_permissions(&open.0, std::fs::Permissions::from_mode(0o666)).unwrap();
    let mut shown = String::new();
    for (name, args) in [
        ("a wrong line", &["--api-keys-file", wrong.path()][..]),
        ("a file that everybody may write", &["--api-keys-file", open.path()]),
        ("no file", &["--api-keys-file", "/nowhere/api-keys"]),
        ("keys, and none needed", &["--api-keys-file", right.path(), "--allow-anonymous"]),
        ("for all the world", &["--listen", "0.0.0.0:0"]),
        ("for all the world, by IPv6", &["--listen", "[::]:0"]),
        ("for this machine, by IPv6", &["--listen", "[::1]:0"]),
        ("for this machine, by IPv4 in IPv6", &["--listen", "[::ffff:127.0.0.1]:0"]),
        ("for all the world, by IPv4 in IPv6", &["--listen", "[::ffff:10.1.2.3]:0"]),
        ("for all the world, with keys", &["--listen", "0.0.0.0:0", "--api-keys-file", right.path()]),
        ("for all the world, as told", &["--listen", "0.0.0.0:0", "--allow-anonymous"]),
    ] {
        // Where the keys are well, the database is what is missing.
        let mut program = command(&[&["run"], args].concat());
        let (code, _, error) = finished(&mut program).await;
        shown += &format!("## {name}\nexit {code:?}: {error}\n\n")
            .replace(wrong.path(), "FILE")
            .replace(open.path(), "FILE");
    }
    assert!(!shown.contains(SHOP) && !shown.contains("short"), "{shown}");
    insta::assert_snapshot!(shown);
}
