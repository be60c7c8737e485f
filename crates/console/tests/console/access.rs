//! Who may see and do what.

use reqwest::{StatusCode, header};

use crate::desk::{ACTOR, Console, LOOKER, NOBODY, Shop, cookie};

async fn console() -> Console {
    let shop = Shop::new("console_access").await;
    Console::start("[outbox.shop]\n", &[("OUTBOX_SHOP_DATABASE_URL", &shop.reader_url)]).await
}

#[tokio::test]
async fn without_a_key_that_has_a_role_there_is_nothing_to_see() {
    let console = console().await;
    for path in ["/", "/outbox/shop", "/inbox/x", "/find?q=a", "/audit", "/metrics", "/nothing"] {
        let bare = console.http.get(console.url(path)).send().await.unwrap();
        assert_eq!(bare.status(), StatusCode::UNAUTHORIZED, "{path}");
        let (status, html) = console.get(path, NOBODY).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{path}");
        assert!(!html.contains("shop"), "{html}");
        let browser = console.http.get(console.url(path)).header(header::ACCEPT, "text/html,*/*");
        let browser = browser.send().await.unwrap();
        assert_eq!(browser.status(), StatusCode::SEE_OTHER, "{path}");
        assert!(browser.headers()[header::LOCATION].to_str().unwrap().starts_with("/login?to=%2F"));
    }
    for path in ["/login", "/style.css", "/refresh.js", "/live", "/ready"] {
        let open = console.http.get(console.url(path)).send().await.unwrap();
        assert_eq!(open.status(), StatusCode::OK, "{path}");
    }
    assert_eq!(console.get("/", LOOKER).await.0, StatusCode::OK);
    assert_eq!(console.get("/metrics", LOOKER).await.0, StatusCode::OK);
    assert_eq!(console.get("/outbox/other", LOOKER).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_browser_logs_in_and_out_with_a_cookie_that_no_other_site_can_use() {
    let console = console().await;
    for wrong in ["key=wrong-0123456789", &format!("key={NOBODY}"), "", "key="] {
        let response = console.http.post(console.url("/login")).body(wrong.to_owned()).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::FORBIDDEN, "{wrong}");
        assert!(response.headers().get(header::SET_COOKIE).is_none());
    }
    let form = format!("key={ACTOR}&to=//evil.example");
    let log_in = || console.http.post(console.url("/login")).body(form.clone());
    let plain = log_in().send().await.unwrap();
    assert_eq!(plain.headers()[header::LOCATION], "/");
    let set = plain.headers()[header::SET_COOKIE].to_str().unwrap().to_owned();
    let (name, rest) = set.split_once('=').unwrap();
    assert_eq!(name, "outbox-console");
    assert!(rest.ends_with("; Path=/; Max-Age=43200; HttpOnly; SameSite=Strict"), "{set}");
    let secure =
        log_in().header(header::ORIGIN, format!("https://{}", console.address)).send().await.unwrap();
    let set = secure.headers()[header::SET_COOKIE].to_str().unwrap();
    assert!(set.starts_with("__Host-outbox-console=") && set.ends_with("; Secure"), "{set}");
    let elsewhere = log_in().header(header::ORIGIN, "https://evil.example").send().await.unwrap();
    assert_eq!(elsewhere.status(), StatusCode::FORBIDDEN);

    let cookie = cookie(&plain);
    let with_cookie = async |cookie: &str| {
        let response =
            console.http.get(console.url("/")).header(header::COOKIE, cookie).send().await.unwrap();
        (response.status(), response.text().await.unwrap())
    };
    let (status, html) = with_cookie(&cookie).await;
    assert_eq!(status, StatusCode::OK);
    assert!(html.contains("actor (act)"), "{html}");
    assert_eq!(with_cookie("outbox-console=x").await.0, StatusCode::UNAUTHORIZED);

    // A form without the session's token does nothing, not even end the session.
    let (_, rest) = html.split_once("name=\"token\" value=\"").unwrap();
    let token = rest.split('"').next().unwrap();
    let log_out = async |body: String| {
        let request = console.http.post(console.url("/logout")).header(header::COOKIE, &cookie).body(body);
        request.send().await.unwrap().status()
    };
    assert_eq!(log_out(String::new()).await, StatusCode::FORBIDDEN);
    assert_eq!(log_out("token=x".to_owned()).await, StatusCode::FORBIDDEN);
    assert_eq!(with_cookie(&cookie).await.0, StatusCode::OK);
    assert_eq!(log_out(format!("token={token}")).await, StatusCode::SEE_OTHER);
    assert_eq!(with_cookie(&cookie).await.0, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn every_response_tells_browsers_to_trust_nothing_else() {
    let console = console().await;
    for path in ["/", "/login", "/nothing", "/style.css"] {
        let response = console.http.get(console.url(path)).bearer_auth(LOOKER).send().await.unwrap();
        let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
        let policy = header("content-security-policy");
        assert!(policy.starts_with("default-src 'none'; script-src 'self'; style-src 'self'"), "{policy}");
        assert!(!policy.contains("unsafe") && !policy.contains("http"), "{policy}");
        assert_eq!(header("x-content-type-options"), "nosniff");
        assert_eq!(header("x-frame-options"), "DENY");
        let html = response.text().await.unwrap();
        assert!(!html.contains("http://") && !html.contains("https://"), "{path}: {html}");
        assert!(!html.contains(" style=") && !html.contains(" onclick"), "{path}: {html}");
    }
}
