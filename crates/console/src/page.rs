//! What all pages share: the frame, the style, the script, and how an error looks.

use maud::{DOCTYPE, Markup, PreEscaped, html};
use poem::{
    IntoResponse, Response,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
};

use crate::{access::User, verdict::Level};

/// The style sheet.
pub const STYLE: &str = include_str!("page/style.css");
/// Reads a page's main part again. Pages work without it.
pub const SCRIPT: &str = include_str!("page/refresh.js");

/// The browser runs the console's script alone, and sends what is typed to the console alone.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

/// The contents of a page.
pub struct Page {
    /// The first heading.
    pub title: String,
    /// Below the heading.
    pub body: Markup,
    /// It shows what changes by itself.
    pub is_live: bool,
}

impl Page {
    /// One that shows what changes by itself.
    pub fn live(title: impl Into<String>, body: Markup) -> Self {
        Self { title: title.into(), body, is_live: true }
    }

    /// One that stays.
    pub fn still(title: impl Into<String>, body: Markup) -> Self {
        Self { title: title.into(), body, is_live: false }
    }

    /// As HTML.
    pub fn render(&self, user: Option<&User>) -> String {
        let Self { title, body, is_live } = self;
        html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta name="color-scheme" content="light dark";
                    title { (escape::line(title)) " - outbox-console" }
                    link rel="stylesheet" href="/style.css";
                    @if *is_live {
                        noscript { meta http-equiv="refresh" content="10"; }
                        script src="/refresh.js" defer {}
                    }
                }
                body {
                    a.skip href="#main" { "To the main part" }
                    header {
                        nav aria-label="Pages" {
                            @if user.is_some() {
                                a href="/" { "All" }
                                a href="/audit" { "Audit" }
                            }
                        }
                        @if let Some(user) = user {
                            form.find role="search" action="/find" method="get" {
                                label for="q" { "Find" }
                                input #q name="q" type="search" placeholder="event id, or TYPE/ID" maxlength="600" autocomplete="off";
                                button { "Find" }
                            }
                            form action="/logout" method="post" {
                                (token(user))
                                span.user { (user.name) " (" (user.role.as_str()) ")" }
                                @if user.form_token.is_some() { button { "Log out" } }
                            }
                        }
                    }
                    main #main data-live[*is_live] {
                        h1 { (escape::line(title)) }
                        (body)
                    }
                }
            }
        }
        .into_string()
    }
}

/// The token of a form.
pub fn token(user: &User) -> Markup {
    html! {
        @if let Some(token) = &user.form_token { input type="hidden" name="token" value=(token); }
    }
}

/// A word and a sign, so that it is not the colour alone.
pub fn level(level: Level) -> Markup {
    let (class, sign) = match level {
        Level::Broken => ("broken", "\u{2716}"),
        Level::Attention => ("attention", "\u{26a0}"),
        Level::Well => ("well", "\u{2714}"),
    };
    html! { span class={ "level " (class) } { span aria-hidden="true" { (sign) } " " (level.as_str()) } }
}

/// Why a request gets no page.
#[derive(Debug)]
pub struct Refused {
    /// The status.
    pub status: StatusCode,
    /// What happened, and what to do next.
    pub text: String,
}

impl Refused {
    /// With this status.
    pub fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self { status, text: text.into() }
    }

    /// There is no such page.
    pub fn unknown() -> Self {
        Self::new(StatusCode::NOT_FOUND, "There is no such page. The first page lists what there is.")
    }

    /// The database that the page is about does not respond.
    pub fn away(reason: &str) -> Self {
        let text = format!("The database could not be asked: {}. Try again.", escape::line(reason));
        Self::new(StatusCode::SERVICE_UNAVAILABLE, text)
    }

    /// As a page.
    pub fn page(&self) -> Page {
        let title = self.status.canonical_reason().unwrap_or("Refused").to_owned();
        Page::still(
            title,
            html! { p role="alert" { (self.text) } p { a href="/" { "All outboxes and inboxes" } } },
        )
    }
}

impl From<sqlx::Error> for Refused {
    fn from(error: sqlx::Error) -> Self {
        Self::away(&crate::outbox::reason(&error))
    }
}

/// A page as a response.
pub fn respond(status: StatusCode, page: &Page, user: Option<&User>) -> Response {
    Response::builder().status(status).content_type("text/html; charset=utf-8").body(page.render(user))
}

/// To another page, by GET.
pub fn go_to(path: &str) -> Response {
    // A path that is no header value has been made up by nobody here.
    let path = HeaderValue::from_str(path).unwrap_or(HeaderValue::from_static("/"));
    let mut response = StatusCode::SEE_OTHER.into_response();
    response.headers_mut().insert(header::LOCATION, path);
    response
}

/// What every response says to a browser.
pub fn protect(headers: &mut HeaderMap) {
    const OPENER: HeaderName = HeaderName::from_static("cross-origin-opener-policy");
    const RESOURCE: HeaderName = HeaderName::from_static("cross-origin-resource-policy");
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        // Not `no-referrer`, with which browsers send `Origin: null`.
        (header::REFERRER_POLICY, "same-origin"),
        (OPENER, "same-origin"),
        (RESOURCE, "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
}

/// SVG and other texts of our own making.
pub fn raw(text: String) -> PreEscaped<String> {
    PreEscaped(text)
}
