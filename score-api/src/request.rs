//! The request, parsed once: whose score, and what it has to contain. Says all that is wrong at once.

mod parameters;

use std::time::Duration;

use poem::Request;
use service::{
    documentation::{Sent, only_query},
    problem::{FieldError, Problem},
};

pub(crate) use self::parameters::{AfterEntry, Limit, PathCpf, Wait};
use crate::{
    read_model::{
        Cpf,
        entries::{self, Page},
    },
    token::Token,
};

/// How many entries a page has when nobody asks.
const PAGE: i32 = 100;

/// What the answer has to contain, and how long the reader waits for it.
pub(crate) struct After {
    pub(crate) token: Token,
    pub(crate) wait: Duration,
}

/// Whose score, and what it has to contain.
pub(crate) fn score(
    request: &Request,
    cpf: Sent<PathCpf>,
    after: (Sent<Token>, Sent<Wait>),
    max_wait: Duration,
) -> Result<(Cpf, Option<After>), Problem> {
    let mut errors = Vec::new();
    let cpf = cpf.read(&mut errors);
    let after = contains(after, max_wait, &mut errors);
    only_query(request, &["after", "wait"], &mut errors);
    finish(errors, || Some((cpf?.0, after)))
}

/// Whose entries, which of them, and what they have to contain.
pub(crate) fn entries(
    request: &Request,
    cpf: Sent<PathCpf>,
    (limit, after_entry): (Sent<Limit>, Sent<AfterEntry>),
    after: (Sent<Token>, Sent<Wait>),
    max_wait: Duration,
) -> Result<(Cpf, Page, Option<After>), Problem> {
    let mut errors = Vec::new();
    let cpf = cpf.read(&mut errors);
    let limit = limit.read(&mut errors).map_or(PAGE.min(entries::MAX), |limit| limit.0);
    let page = Page { limit, after: after_entry.read(&mut errors).map(|after| after.0) };
    let after = contains(after, max_wait, &mut errors);
    only_query(request, &["limit", "after_entry", "after", "wait"], &mut errors);
    finish(errors, || Some((cpf?.0, page, after)))
}

fn contains(
    (after, wait): (Sent<Token>, Sent<Wait>),
    max_wait: Duration,
    errors: &mut Vec<FieldError>,
) -> Option<After> {
    if wait.given() && !after.given() {
        errors.push(error("query: after", "is required with `wait`".into()));
    }
    let token = after.read(errors);
    let wait = match wait.read(errors) {
        None => Some(Duration::ZERO),
        Some(Wait(wait)) => wait.filter(|wait| *wait <= max_wait),
    };
    if wait.is_none() {
        errors.push(error("query: wait", format!("must look like 500ms or 2s and be at most {max_wait:?}")));
    }
    Some(After { token: token?, wait: wait? })
}

fn error(pointer: &'static str, detail: String) -> FieldError {
    FieldError { pointer: pointer.into(), detail: detail.into() }
}

/// What was asked, if nothing is wrong with it.
fn finish<T>(errors: Vec<FieldError>, asked: impl FnOnce() -> Option<T>) -> Result<T, Problem> {
    if errors.is_empty()
        && let Some(asked) = asked()
    {
        return Ok(asked);
    }
    Err(Problem::invalid(errors))
}
