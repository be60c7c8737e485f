//! Parses a request once: the person, and the version that the response must contain. Reports all errors together.

use std::time::Duration;

use daemon::config;
use poem::Request;
use web::{
    parameters::{Parameters, hyphenated},
    problem::{FieldError, Problem},
    tag::Tag,
};

use crate::{
    read_model::{
        Cpf,
        entries::{self, Page},
    },
    token::Token,
};

/// The default number of entries on a page.
const PAGE: i32 = 100;

/// The version that the response must contain, and how long the reader waits for it.
pub(crate) struct After {
    pub(crate) token: Token,
    pub(crate) wait: Duration,
}

/// Parses a request for a score.
pub(crate) fn score(request: &Request, max_wait: Duration) -> Result<(Cpf, Option<After>), Problem> {
    let mut parameters = Parameters::of(request);
    let cpf = cpf(&mut parameters);
    let after = after(&mut parameters, max_wait);
    parameters.only_query(&["after", "wait"]);
    parameters.finish(|| Some((cpf?, after)))
}

/// Parses a request for a page of entries.
pub(crate) fn entries(request: &Request, max_wait: Duration) -> Result<(Cpf, Page, Option<After>), Problem> {
    let mut parameters = Parameters::of(request);
    let cpf = cpf(&mut parameters);
    let limit = parameters.query("limit", |text| {
        let limit = text.parse().ok().filter(|limit| (1..=entries::MAX).contains(limit));
        limit.ok_or_else(|| format!("must be an integer from 1 to {}", entries::MAX).into())
    });
    let page = Page {
        limit: limit.unwrap_or(PAGE.min(entries::MAX)),
        after: parameters.query("after_entry", hyphenated),
    };
    let after = after(&mut parameters, max_wait);
    parameters.only_query(&["limit", "after_entry", "after", "wait"]);
    parameters.finish(|| Some((cpf?, page, after)))
}

fn cpf(parameters: &mut Parameters<'_>) -> Option<Cpf> {
    let rule = "must be a positive integer of at most 11 digits";
    parameters.path("cpf", |text| text.parse().map_err(|()| rule.into()))
}

/// Parses `after`, and `wait`, which requires it.
fn after(parameters: &mut Parameters<'_>, max_wait: Duration) -> Option<After> {
    if parameters.has_query("wait") && !parameters.has_query("after") {
        let detail = "is required with `wait`".into();
        parameters.errors.push(FieldError { pointer: "query: after".into(), detail });
    }
    let token = parameters.query("after", |text| {
        let tag = text.parse::<Tag>();
        tag.map_err(|_| "must be an ETag of the person service: a person's id, a dot, and a version".into())
    });
    let wait = parameters.query("wait", |text| {
        let wait = config::duration(text).ok().filter(|wait| *wait <= max_wait);
        wait.ok_or_else(|| format!("must look like 500ms or 2s and be at most {max_wait:?}").into())
    });
    Some(After { token: token?.into(), wait: wait.unwrap_or_default() })
}
