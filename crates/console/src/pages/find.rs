//! Find an event or an aggregate.

use maud::html;

use crate::{Console, page::Page};

/// What was found of `query`.
pub async fn page(_console: &Console, query: &str) -> Page {
    Page::still("Find", html! { p { (escape::line(query)) } })
}
